"""Estimates of memory, with the settings of a pass as keywords."""

from typing import Any

from efficientllm.space.dims import Shape, Space
from efficientllm.training.memory_estimate import Memory, PassSetup, estimate


def memory_of(
    space: Space, shape: Shape, *, micro_batch_size: int, batch_rows: int | None = None, **setup: Any
) -> Memory:
    return estimate(space, shape, PassSetup(**setup), micro_batch_size=micro_batch_size, batch_rows=batch_rows)
