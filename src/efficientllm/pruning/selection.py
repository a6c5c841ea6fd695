"""Selection: which group goes next, and whether the model can still land on its target (issue 1, "Landing")."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from efficientllm.space.cost import Polynomial
from efficientllm.space.dims import Shape
from efficientllm.space.limits import Limits


@dataclass(frozen=True)
class Removal:
    """One minimal parameter group that goes: the decision, ready to be executed, printed or replayed.

    Attributes:
        units: source indices of the units of every dim, by dim name.
        saliencies: the lowest group saliency of every kind that could still go, the chosen one's included.
    """

    step: int
    kind: str
    units: dict[str, int]
    saliencies: dict[str, float]
    params_before: int
    params_after: int

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Queue:
    """The groups of one kind in the order in which they would go: the k-th takes each dim's k-th least salient unit.

    `units` is (dims, units) and `saliencies` (units); a group's saliency is the mean over dims of its units'.
    """

    units: list[list[int]]
    saliencies: list[float]
    taken: int = 0

    @property
    def head(self) -> float:
        return self.saliencies[self.taken] if self.taken < len(self.saliencies) else float("inf")

    def pop(self) -> list[int]:
        chosen = [row[self.taken] for row in self.units]
        self.taken += 1
        return chosen


def queue_groups(scores: Tensor, counted: Sequence[bool] | None = None) -> Queue:
    """Returns the groups of a bundle from its unit scores (dims, units), least salient first; ties break by index.

    `counted` leaves dims out of the mean: the query heads of a KV group that is already retired.
    """
    ordered, units = scores.float().cpu().sort(dim=1, stable=True)
    if counted is not None:
        ordered = ordered[torch.tensor(counted)]
    return Queue(units.tolist(), ordered.double().mean(0).tolist())


def choose_kind(
    queues: Mapping[str, Queue], shape: Shape, limits: Limits, num_params: Polynomial, targets: Sequence[int]
) -> str | None:
    """Returns the kind whose next group is least salient among those that may go; ties break by the kind's name."""
    ranked = sorted((queue.head, kind) for kind, queue in queues.items())
    for _, kind in ranked:
        if may_remove(kind, shape, limits, num_params, targets):
            return kind
    return None


def is_landed(shape: Shape, limits: Limits, num_params: Polynomial, target: int) -> bool:
    """Returns whether the shape is legal and at or under the target."""
    return num_params(shape) <= target and limits.close(shape) == shape


def may_remove(kind: str, shape: Shape, limits: Limits, num_params: Polynomial, targets: Sequence[int]) -> bool:
    """Returns whether a unit of `kind` may go so that the model can still end within one FFN tile of every target.

    Once completing the open tiles is enough, only they go on.
    """
    if shape[kind] - 1 < limits.floor[kind]:
        return False
    closed = limits.close(shape)
    if num_params(closed) <= targets[0]:
        return closed[kind] < shape[kind]
    after = limits.close({**shape, kind: shape[kind] - 1})
    return after == closed or all(can_land(after, limits, num_params, target) for target in targets)


def can_land(shape: Shape, limits: Limits, num_params: Polynomial, target: int) -> bool:
    """Returns whether a legal shape at or below `shape` has between (target - one FFN tile over all layers, target].

    With the other kinds fixed, FFN tiles cover a whole interval in steps of one tile, so only the others are searched:
    the shape's own first, then smaller hidden sizes, by bisection, for every number of heads.
    """
    if _fills(shape, limits, num_params, target) == 0:
        return True
    hidden_sizes = limits.legal_sizes("hidden", shape["hidden"])
    heads = product(
        reversed(limits.legal_sizes("kv", shape["kv"])), reversed(limits.legal_sizes("query", shape["query"]))
    )
    for num_kv, num_query in heads:
        low, high = 0, len(hidden_sizes) - 1
        while low <= high:
            middle = (low + high) // 2
            candidate = {**shape, "hidden": hidden_sizes[middle], "kv": num_kv, "query": num_query}
            fit = _fills(candidate, limits, num_params, target)
            if fit == 0:
                return True
            low, high = (low, middle - 1) if fit > 0 else (middle + 1, high)
    return False


def _fills(shape: Shape, limits: Limits, num_params: Polynomial, target: int) -> int:
    """Returns 0 if FFN tiles can bring the shape into the window, 1 if it stays too large, -1 if it is too small."""
    if num_params({**shape, "ffn": limits.floor["ffn"]}) > target:
        return 1
    return 0 if num_params(shape) > target - ffn_tile_params(shape, limits, num_params) else -1


def ffn_tile_params(shape: Shape, limits: Limits, num_params: Polynomial) -> int:
    """Returns the parameters that one FFN tile over all layers holds."""
    return num_params({**shape, "ffn": limits.tile["ffn"]}) - num_params({**shape, "ffn": 0})


def o_columns(kind: str, shape: Shape, head_dim: int) -> int:
    """Returns what a group takes in slots: a channel 1, a stem dimension 2, heads the columns of O per layer."""
    return {"ffn": 1, "hidden": 2, "kv": shape["query"] * head_dim, "query": shape["kv"] * head_dim}[kind]
