"""What a person sees during a run: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from efficientllm.numbers import format_count

PLAIN_LINES = 20  # over a whole run
PLAIN_SECONDS = 30.0  # at most this long without one


class Display:
    """Shows the rows of metrics.jsonl as they come; also the run's other messages, in order.

    Attributes:
        warned: every warning shown so far.
    """

    def __init__(self, total_steps: int, quiet: bool = False) -> None:
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)
        self.total_steps = total_steps
        self.warned: list[str] = []
        self._last = 0.0
        self._progress = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[size]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total_steps, phase="prune", loss="-", size="-", speed="-")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, message: str) -> None:
        self.console.print(message, markup=False)

    def warn(self, message: str) -> None:
        self.warned.append(message)
        self.console.print(f"warning: {message}", style="yellow", markup=False)

    def calibrating(self, done: int, batches: int) -> None:
        """Shows the progress of calibration, before anything is removed."""
        self._progress.update(self._task, phase=f"calibrating {done}/{batches}")
        now = time.monotonic()
        if done == batches or now - self._last > PLAIN_SECONDS:
            self._last = now
            self.say(f"calibrated on {done} of {batches} batches")

    def show(self, row: Mapping[str, Any]) -> None:
        """Shows one row; validation losses also stay on the screen."""
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        size, speed = format_count(row["params"]), format_count(row["tokens_per_second"] or 0)
        self._progress.update(self._task, completed=row["step"], phase=row["phase"], loss=loss, size=size, speed=speed)
        valid = f"  valid loss {row['valid_loss']:.4f}" if "valid_loss" in row else ""
        now = time.monotonic()
        due = row["step"] % max(1, self.total_steps // PLAIN_LINES) == 0 or now - self._last > PLAIN_SECONDS
        if valid or (due and not self.console.is_terminal):
            self._last = now
            left = (
                (self.total_steps - row["step"]) * row["tokens"] / max(row["step"], 1) / (row["tokens_per_second"] or 1)
            )
            rest = f"  {_duration(left)} left" if row["tokens_per_second"] and row["step"] < self.total_steps else ""
            self.say(
                f"step {row['step']}/{self.total_steps}  {row['phase']}  loss {loss}  {row['params']:,} parameters  "
                f"{speed} tok/s{rest}{valid}"
            )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
