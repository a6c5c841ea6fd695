"""The failure signatures of pruning while training: each is reported once, with what to change."""

from collections.abc import Sequence
from statistics import fmean, median, pstdev
from typing import Any

from efficientllm.pruning.selection import Removal
from efficientllm.space.dims import Shape, of_kind
from efficientllm.space.limits import Limits

RECENT = 50  # steps that losses and gradient norms are compared with
ENOUGH = 20  # recent steps before anything is said
JUMP = 4.0  # standard deviations
EXPLOSION = 20.0  # times the recent median
DOMINANCE = 0.9  # share of the parameters removed
EARLY = 0.5  # share of what is to go, before which nothing is said about it: FFN channels mostly go first
FLAG = {"hidden": "--min-hidden", "ffn": "--min-ffn", "kv": "--min-kv"}


class FailureSigns:
    """Looks at every step for a loss that jumps after a removal, a one-sided selection and exploding gradients."""

    def __init__(self, limits: Limits, total_removed: int) -> None:
        self.limits, self.total_removed = limits, total_removed
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.removed: dict[str, int] = {}
        self.told: list[str] = []

    def observe(self, loss: float, grad_norm: float, removed_before: bool) -> list[str]:
        """Returns the warnings of one step: its loss (after a removal or not) and gradient norm."""
        found = []
        if removed_before and len(self.losses) >= ENOUGH:
            spread = pstdev(self.losses)
            if loss > fmean(self.losses) + JUMP * spread:
                found += self._tell(
                    "jump",
                    f"the loss jumped to {loss:.3f} right after a removal (recently {fmean(self.losses):.3f} ± "
                    f"{spread:.3f}); prune more slowly (--prune-tokens), or try --compensate or --score-ema 0.9",
                )
        if len(self.norms) >= ENOUGH and grad_norm > EXPLOSION * median(self.norms):
            found += self._tell(
                "explosion",
                f"the gradient norm exploded to {grad_norm:.3g} (recently {median(self.norms):.3g}); "
                "lower --lr or prune more slowly",
            )
        self.losses = [*self.losses, loss][-RECENT:]
        self.norms = [*self.norms, grad_norm][-RECENT:]
        return found

    def observe_removals(self, removals: Sequence[Removal], shape: Shape) -> list[str]:
        """Returns the warnings that a step's removals, which led to `shape`, give cause for."""
        found = []
        for removal in removals:
            taken = removal.params_before - removal.params_after
            self.removed[removal.kind] = self.removed.get(removal.kind, 0) + taken
        for kind in {removal.kind for removal in removals}:
            sizes = of_kind(shape, kind)
            if sizes == of_kind(self.limits.floor, kind):  # in every layer
                least = min(sizes.values())
                advice = f"lower {FLAG[kind]}, " if kind in FLAG and least > 1 else ""
                found += self._tell(
                    f"floor {kind}", f"{kind} is at its floor of {least}; {advice}or choose a larger target"
                )
        total = sum(self.removed.values())
        for kind, taken in self.removed.items():
            if total > EARLY * self.total_removed and taken > DOMINANCE * total:
                found += self._tell(
                    f"one-sided {kind}",
                    f"{taken / total:.0%} of the removed parameters are {kind}; if you do not want that, set "
                    f"{FLAG.get(kind, '--min-kv')}, try --scored-layers all, or larger batches",
                )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "norms": self.norms, "removed": self.removed, "told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.norms = state["losses"], state["norms"]
        self.removed, self.told = state["removed"], state["told"]

    def _tell(self, what: str, message: str) -> list[str]:
        if what in self.told:
            return []
        self.told.append(what)
        return [message]
