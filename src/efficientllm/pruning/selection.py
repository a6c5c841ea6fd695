"""Selection: which group goes next.

In the per-layer layout every layer has bundles of its own; they compete with each other as kinds do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from efficientllm.pruning.landing import may_remove
from efficientllm.space.dims import Measure, Shape, kind_of, of_kind
from efficientllm.space.limits import Limits

LOOK = 16  # groups of a queue that are sorted at first

Order = Callable[[Shape], Sequence[str]]  # the kinds at a shape, the one that would go first in front


@dataclass(frozen=True)
class Removal:
    """One minimal parameter group that goes: the decision, ready to be executed, printed or replayed.

    Attributes:
        units: source indices of the units of every dim, by dim name.
        saliencies: the lowest group saliency of every kind that could still go, the chosen one's included; of all
            layers' bundles where each layer has its own.
    """

    step: int
    kind: str
    units: dict[str, int]
    saliencies: dict[str, float]
    params_before: int
    params_after: int

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


class Queue:
    """The groups of one bundle in the order in which they would go: the k-th takes each dim's k-th least salient unit.

    A group's saliency is the mean over dims of its units'. Ties break by index. Looked up only as far as it is asked,
    for a step takes few groups and the device waits meanwhile.

    Args:
        scores: of the bundle's units, (dims, units).
        counted: which dims count in the mean (default: all); not the query heads of a KV group that is retired.
    """

    def __init__(self, scores: Tensor, counted: Sequence[bool] | None = None) -> None:
        self.scores, self.counted = scores.float(), counted
        self.taken = 0
        self._units: list[list[int]] = []
        self._saliencies: list[float] = []

    @property
    def head(self) -> float:
        """The saliency of the group that would go next; infinity if there is none."""
        self._look()
        return self._saliencies[self.taken] if self.taken < len(self._saliencies) else float("inf")

    def pop(self) -> list[int]:
        """Takes the next group: a unit of every dim."""
        self._look()
        chosen = self._units[self.taken]
        self.taken += 1
        return chosen

    def _look(self) -> None:
        """Sorts twice as many groups when those that are known have been taken."""
        known, every = len(self._units), self.scores.shape[1]
        if self.taken < known or known == every:
            return
        units = least(self.scores, min(max(LOOK, 2 * known), every))
        ordered = self.scores.gather(1, units)
        if self.counted is not None:
            ordered = ordered[torch.tensor(self.counted)]
        self._units, self._saliencies = units.T.tolist(), ordered.double().mean(0).tolist()


def least(scores: Tensor, count: int) -> Tensor:
    """Returns the indices (rows, count) of each row's least entries, in order; ties go by index.

    They are what a stable sort begins with, which takes ten times as long.
    """
    if count < scores.shape[1]:
        values, units = scores.topk(count + 1, dim=1, largest=False)
        if not (values[:, -1] == values[:, -2]).any():  # else it may have left the first of several alike out
            units = units[:, :-1].sort(dim=1).values
            return units.gather(1, scores.gather(1, units).sort(dim=1, stable=True).indices)
    return scores.sort(dim=1, stable=True).indices[:, :count]


def choose_kind(
    queues: Mapping[str, Queue],
    shape: Shape,
    limits: Limits,
    measure: Measure,
    targets: Sequence[int],
    order: Order | None = None,
) -> str | None:
    """Returns the bundle whose next group is least salient among those that may go; ties break by name.

    Bundles are kinds, or in the per-layer layout each layer's. With an order: the first bundle in it that may go.
    """
    ranked = (
        order(shape) if order else [name for _, name in sorted((queue.head, name) for name, queue in queues.items())]
    )
    for bundle in ranked:
        if may_remove(bundle, shape, limits, measure, targets):
            return bundle
    return None


def o_columns(bundle: str, shape: Shape, head_dim: int) -> float:
    """Returns what a group takes in slots: a channel 1, a stem dimension 2, heads the columns of O per layer.

    A group of one layer takes its layer's share of that.
    """
    kind = kind_of(bundle)
    if kind in ("kv", "query"):
        other = bundle.removesuffix(kind) + {"kv": "query", "query": "kv"}[kind]
        slots = shape[other] * head_dim
    else:
        slots = {"ffn": 1, "hidden": 2}[kind]
    return slots / len(of_kind(shape, kind))
