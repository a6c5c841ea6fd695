"""Selection: which group goes next, and whether the model can still land on its target (issue 1, "Landing")."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from efficientllm.space.dims import Measure, Shape
from efficientllm.space.limits import Limits

Order = Callable[[Shape], Sequence[str]]  # the kinds at a shape, the one that would go first in front


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
    ordered, units = scores.float().sort(dim=1, stable=True)
    if counted is not None:
        ordered = ordered[torch.tensor(counted)]
    return Queue(units.tolist(), ordered.double().mean(0).tolist())


def choose_kind(
    queues: Mapping[str, Queue],
    shape: Shape,
    limits: Limits,
    measure: Measure,
    targets: Sequence[int],
    order: Order | None = None,
) -> str | None:
    """Returns the kind whose next group is least salient among those that may go; ties break by the kind's name.

    With an order: the first kind in it that may go.
    """
    ranked = (
        order(shape) if order else [kind for _, kind in sorted((queue.head, kind) for kind, queue in queues.items())]
    )
    for kind in ranked:
        if may_remove(kind, shape, limits, measure, targets):
            return kind
    return None


def is_landed(shape: Shape, limits: Limits, measure: Measure, target: int) -> bool:
    """Returns whether the shape is legal and at or under the target."""
    return measure(shape) <= target and limits.close(shape) == shape


def may_remove(kind: str, shape: Shape, limits: Limits, measure: Measure, targets: Sequence[int]) -> bool:
    """Returns whether a unit of `kind` may go so that the model can still end within one FFN tile of every target.

    Once completing the open tiles is enough, only they go on.
    """
    if shape[kind] - 1 < limits.floor[kind]:
        return False
    closed = limits.close(shape)
    if measure(closed) <= targets[0]:
        return closed[kind] < shape[kind]
    after = limits.close({**shape, kind: shape[kind] - 1})
    return after == closed or can_land(after, limits, measure, *targets)


def can_land(shape: Shape, limits: Limits, measure: Measure, *targets: int) -> bool:
    """Returns whether legal shapes lie at or below `shape`, each at or below the one before, that land on every target.

    A shape lands where its size lies in (target - one FFN tile over all layers, target]. Targets fall.
    """
    if not targets:
        return True
    return any(
        can_land(landing, limits, measure, *targets[1:]) for landing in _landings(shape, limits, measure, targets[0])
    )


def _landings(shape: Shape, limits: Limits, measure: Measure, target: int) -> Iterator[Shape]:
    """Yields the shapes at or below `shape` that land on a target, each with the widest FFN that does.

    With the other kinds fixed, FFN tiles cover a whole interval in steps of one tile, so only the others are searched:
    the shape's own first, then for every number of heads the hidden sizes, larger ones first, from the largest that is
    not too large, by bisection.
    """
    if _fills(shape, limits, measure, target) == 0:
        yield _filled(shape, limits, measure, target)
    hidden_sizes = limits.legal_sizes("hidden", shape["hidden"])
    heads = product(
        reversed(limits.legal_sizes("kv", shape["kv"])), reversed(limits.legal_sizes("query", shape["query"]))
    )
    for num_kv, num_query in heads:
        with_heads = {**shape, "kv": num_kv, "query": num_query}
        fits = partial(_fills_at, with_heads, limits, measure, target)
        for hidden in reversed(hidden_sizes[: bisect_left(hidden_sizes, 1, key=fits)]):
            if fits(hidden) < 0:
                break
            yield _filled({**with_heads, "hidden": hidden}, limits, measure, target)


def _fills_at(shape: Shape, limits: Limits, measure: Measure, target: int, hidden: int) -> int:
    return _fills({**shape, "hidden": hidden}, limits, measure, target)


def _fills(shape: Shape, limits: Limits, measure: Measure, target: int) -> int:
    """Returns 0 if FFN tiles can bring the shape into the window, 1 if it stays too large, -1 if it is too small."""
    if measure({**shape, "ffn": limits.floor["ffn"]}) > target:
        return 1
    size = measure(shape)
    return 0 if size > target or size > target - ffn_tile_size(shape, limits, measure) else -1


def _filled(shape: Shape, limits: Limits, measure: Measure, target: int) -> Shape:
    """Returns a shape that fills with the widest legal FFN at or under the target."""
    widths = limits.legal_sizes("ffn", shape["ffn"])
    fitting = bisect_right(widths, target, key=lambda ffn: measure({**shape, "ffn": ffn}))
    return {**shape, "ffn": widths[fitting - 1]}


def ffn_tile_size(shape: Shape, limits: Limits, measure: Measure) -> int:
    """Returns what one FFN tile over all layers adds to the size.

    To a source whose width is no multiple of the tile the last step is narrower, but may be larger in bytes.
    """
    wider = {**shape, "ffn": min(shape["ffn"] + limits.tile["ffn"], limits.source["ffn"])}
    tile = measure({**shape, "ffn": limits.tile["ffn"]}) - measure({**shape, "ffn": 0})
    return max(tile, measure(wider) - measure(shape))


def o_columns(kind: str, shape: Shape, head_dim: int) -> int:
    """Returns what a group takes in slots: a channel 1, a stem dimension 2, heads the columns of O per layer."""
    return {"ffn": 1, "hidden": 2, "kv": shape["query"] * head_dim, "query": shape["kv"] * head_dim}[kind]
