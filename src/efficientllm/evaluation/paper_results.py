"""Zero-shot averages that the paper reports (arXiv 2502.06663, table 2), for comparison: quoted, not ours.

Only averages of its seven tasks are here, in percent (docs/method.md section 8).
"""

from collections.abc import Iterable
from math import log
from typing import NamedTuple

NEAR = 2.0  # times larger or smaller that a model may be than the class it is shown beside


class Quoted(NamedTuple):
    """A row of the paper: its model and the mean of its seven tasks."""

    model: str
    average: float


CLASSES: dict[int, tuple[Quoted, ...]] = {  # by the parameters of the paper's own model
    134_000_000: (Quoted("EfficientLLM-134M, 500B tokens", 50.54), Quoted("SmolLM-135M", 49.87)),
    469_000_000: (
        Quoted("EfficientLLM-469M, 50B tokens", 54.77),
        Quoted("EfficientLLM-469M, 500B tokens", 57.35),
        Quoted("SmolLM-360M", 54.48),
        Quoted("Qwen2.5-0.5B", 53.20),
    ),
    1_100_000_000: (
        Quoted("EfficientLLM-1.1B, 50B tokens", 59.03),
        Quoted("EfficientLLM-1.1B, 320B tokens", 60.75),
        Quoted("Llama3.2-1B", 56.69),
        Quoted("OLMo-1B", 55.66),
        Quoted("Sheared-1.3B", 54.00),
    ),
}


def same_size(sizes: Iterable[int]) -> list[Quoted]:
    """Returns the paper's rows of the class that each model is nearest to, if it is within twice its size."""
    found: dict[int, tuple[Quoted, ...]] = {}
    for size in sizes:
        nearest = min(CLASSES, key=lambda each: abs(log(size / each)))
        if max(size / nearest, nearest / size) <= NEAR:
            found[nearest] = CLASSES[nearest]
    return [row for size in sorted(found) for row in found[size]]
