"""Rows of metrics.jsonl: figures of steps stay on the device until they are asked for, so that steps never wait."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficientllm.errors import TrainingError
from efficientllm.pruning import Removal
from efficientllm.space.dims import Shape
from efficientllm.training.failure_signs import FailureSigns

MOST_SKIPPED = 5  # steps in a row without a finite loss


class Metrics:
    """The steps whose figures have not been read yet, and what those before have shown.

    Attributes:
        skipped: steps whose loss or gradient was not finite, up to the last `settle`.
    """

    def __init__(self, signs: FailureSigns, batch_tokens: int) -> None:
        self.signs, self.batch_tokens = signs, batch_tokens
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._broken_at: int | None = None  # the last of too many steps in a row
        self._removed_last = False
        self._pending: list[tuple[dict[str, Any], Tensor, Sequence[Removal], Shape, tuple[str, ...]]] = []
        self._settled = time.perf_counter()

    def add(
        self,
        row: dict[str, Any],
        loss: Tensor,
        norm: Tensor,
        removals: Sequence[Removal],
        shape: Shape,
        parts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Takes one step: its row, with warnings but without figures, and what it removed on the way to `shape`.

        Args:
            parts: of the loss, by the names that the row gives them.
        """
        parts = parts or {}
        figures = torch.stack([loss, norm.to(loss.dtype), *parts.values()])
        self._pending.append((row, figures, removals, shape, tuple(parts)))

    def settle(self) -> list[dict[str, Any]]:
        """Returns the rows of the steps since the last call; waits for the device."""
        pending, self._pending = self._pending, []
        if not pending:
            return []
        numbers = torch.stack([figures for _, figures, *_ in pending]).tolist()
        speed = round(len(pending) * self.batch_tokens / (time.perf_counter() - self._settled), 1)
        self.begin_timing()
        return [
            self._finish({**row, **_finite(names, parts), "tokens_per_second": speed}, loss, norm, removals, shape)
            for (row, _, removals, shape, names), (loss, norm, *parts) in zip(pending, numbers, strict=True)
        ]

    def check(self) -> None:
        """Raises TrainingError after five steps in a row without a finite loss, once their rows have been read."""
        if self._broken_at is not None:
            raise TrainingError(
                f"the loss or its gradient was not finite in {MOST_SKIPPED} steps in a row (up to step "
                f"{self._broken_at}); lower --lr"
            )

    def begin_timing(self) -> None:
        """Leaves what has been done since the last `settle` out of the next speed: validation, a checkpoint."""
        self._settled = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Returns JSON values; nothing may be pending."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "removed_last": self._removed_last,
            "watch": self.signs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._removed_last = state["removed_last"]
        self.signs.load_state_dict(state["watch"])

    def _finish(
        self, row: dict[str, Any], loss: float, norm: float, removals: Sequence[Removal], shape: Shape
    ) -> dict[str, Any]:
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.skipped += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        warnings = row.pop("warnings")
        warnings += self.signs.observe(loss, norm, self._removed_last) if finite else []
        warnings += self.signs.observe_removals(removals, shape)
        self._removed_last = bool(removals)
        if self._skipped_in_a_row == MOST_SKIPPED:
            self._broken_at = row["step"]
        row |= _finite(("loss", "grad_norm"), (loss, norm))
        row["skipped"] = self.skipped
        return {**row, "warnings": warnings} if warnings else row


def _finite(names: Sequence[str], numbers: Sequence[float]) -> dict[str, float | None]:
    """Returns numbers by name, None for what is not finite: JSON has no word for it."""
    return {name: number if math.isfinite(number) else None for name, number in zip(names, numbers, strict=True)}
