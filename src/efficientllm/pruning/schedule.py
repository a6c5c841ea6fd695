"""Schedule: when a removal is due (docs/method.md section 4). Steps count from 1; the warm-up has none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearPace:
    """The size falls in a straight line over steps, from the source at `warmup_steps` to the target at `steps`.

    Attributes:
        steps: the optimizer step at which the target is reached.
        warmup_steps: steps before the first removal.
    """

    steps: int
    warmup_steps: int = 0

    def is_due(self, step: int, next_step: float, size: int, source: int, target: int) -> bool:
        """Returns whether a removal is due: the model is larger than the line allows at this step."""
        if step <= self.warmup_steps:
            return False
        if step >= self.steps:
            return True
        passed = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return size > source - (source - target) * passed

    def wait(self, next_step: float, step: int, slots: float) -> float:
        return next_step


@dataclass(frozen=True)
class SlotPace:
    """Each removal is followed by a wait in proportion to what it took away: the paper's slots.

    Attributes:
        slot_steps: N, the optimizer steps of one slot; below 1, several slots go by in a step.
        warmup_steps: steps before the first removal.
        equal: every removal costs one slot, of any kind: a ratio of removals to steps (the paper's 4:1 to 1:9).
    """

    slot_steps: float
    warmup_steps: int = 0
    equal: bool = False

    def is_due(self, step: int, next_step: float, size: int, source: int, target: int) -> bool:
        """Returns whether the wait of the last removal ends within this step."""
        return step > self.warmup_steps and max(next_step, self.warmup_steps + 1) < step + 1 - 1e-9

    def wait(self, next_step: float, step: int, slots: float) -> float:
        """Returns the step at which the next removal is due, after one that took `slots` slots."""
        return max(next_step, self.warmup_steps + 1) + self.slot_steps * (1 if self.equal else slots)


Pace = LinearPace | SlotPace
