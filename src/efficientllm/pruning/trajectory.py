"""Trajectory: the removals of a run before it starts, by the rules of the run itself, for an assumed order of kinds."""

from collections.abc import Iterable, Sequence
from itertools import pairwise, permutations
from math import floor
from typing import NamedTuple

from efficientllm.errors import BudgetError
from efficientllm.pruning.landing import is_landed, may_become, may_remove
from efficientllm.pruning.schedule import Pace
from efficientllm.pruning.selection import Order, o_columns
from efficientllm.space.dims import KINDS, Measure, Shape, of_kind, shape_text
from efficientllm.space.limits import Limits


class Planned(NamedTuple):
    """Removals of a plan: the optimizer step after which they happen, and what is left then.

    One, or where layers shrink each on its own, as many as layers lose a unit at once.
    """

    step: int
    kind: str
    shape: Shape
    size: int
    removals: int = 1


def simulate(
    measure: Measure,
    limits: Limits,
    targets: Iterable[int],
    pace: Pace,
    head_dim: int,
    order: Order,
) -> list[Planned]:
    """Returns every removal from the source to the least of `targets`, landing on each of them.

    A removal that the landing rule forbids is passed over for the next kind, as in the run.

    Raises:
        BudgetError: if no kind may go before a target is reached.
    """
    shape, size = limits.source, measure(limits.source)
    source, left = size, sorted(set(targets), reverse=True)
    final = left[-1]
    planned: list[Planned] = []
    step, next_step = 1, 0.0
    while left:
        while not is_landed(shape, limits, measure, left[0]) and pace.is_due(step, next_step, size, source, final):
            kinds = ((kind, losing(kind, shape, limits, measure, left)) for kind in order(shape))
            kind, bundles = next(((kind, bundles) for kind, bundles in kinds if bundles), ("", []))
            if not bundles:
                raise BudgetError(
                    f"no group can be removed from {shape_text(shape)} on the way to a target of {left[0]:,}"
                )
            for bundle in bundles:
                next_step = pace.wait(next_step, step, o_columns(bundle, shape, head_dim))
            shape = one_less(shape, bundles)
            size = measure(shape)
            planned.append(Planned(step, kind, shape, size, len(bundles)))
        while left and is_landed(shape, limits, measure, left[0]):
            left.pop(0)
        step = max(step + 1, floor(next_step))  # nothing is due before
    return planned


def losing(kind: str, shape: Shape, limits: Limits, measure: Measure, targets: Sequence[int]) -> list[str]:
    """Returns the bundles of a kind that lose a unit next: of all layers that can, or where they may not, of one."""
    able = [bundle for bundle, size in of_kind(shape, kind).items() if size > limits.floor[bundle]]
    if len(able) > 1 and may_become(one_less(shape, able), shape, limits, measure, targets):
        return able
    able.sort(key=lambda bundle: -shape[bundle])
    return next(([bundle] for bundle in able if may_remove(bundle, shape, limits, measure, targets)), [])


def one_less(shape: Shape, bundles: Iterable[str]) -> Shape:
    """Returns the shape with a unit less in each of the bundles."""
    return {**shape, **{bundle: shape[bundle] - 1 for bundle in bundles}}


def pruning_steps(measure: Measure, limits: Limits, target: int, pace: Pace, head_dim: int) -> int:
    """Returns the steps from the first removal to the last at a pace without warm-up, all kinds in proportion."""
    planned = simulate(measure, limits, [target], pace, head_dim, proportional(limits))
    return planned[-1].step if planned else 0


def proportional(limits: Limits) -> Order:
    """Returns the order in which all kinds keep about the same share of their units; ties break by name."""
    source = {kind: sum(of_kind(limits.source, kind).values()) for kind in KINDS}
    return lambda shape: sorted(KINDS, key=lambda kind: (-sum(of_kind(shape, kind).values()) / source[kind], kind))


def even(limits: Limits) -> Order:
    """Returns the order in which hidden size, FFN width and heads lose the same share, each to the nearest unit.

    KV groups and query heads are one kind here, heads: a group that takes its query heads along, or one query head of
    every group, whichever leaves the heads nearer; of two that do as well, the group.
    """
    source = limits.source

    def share(kind: str, shape: Shape) -> float:
        """What is left of a kind when half of its next unit is gone."""
        after = {**shape, kind: shape[kind] - 0.5}
        if kind in ("kv", "query"):
            return after["kv"] * after["query"] / (source["kv"] * source["query"])
        return after[kind] / source[kind]

    return lambda shape: sorted(KINDS, key=lambda kind: (-share(kind, shape), kind))


def toward(goal: Shape) -> Order:
    """Returns the order of the kinds that are above a goal, and no others."""
    return lambda shape: [kind for kind in KINDS if shape[kind] > goal[kind]]


def as_logged(kinds: Sequence[str], limits: Limits) -> Order:
    """Returns the order of a log's kinds, one a removal; past its end all kinds go in proportion."""
    rest = proportional(limits)
    units = sum(limits.source.values())

    def order(shape: Shape) -> Sequence[str]:
        removed = units - sum(shape.values())
        return [*kinds[removed : removed + 1], *rest(shape)]

    return order


def extreme_orders(limits: Limits) -> list[Order]:
    """Returns every order that exhausts one kind before it begins the next."""
    movable = [kind for kind in KINDS if of_kind(limits.floor, kind) != of_kind(limits.source, kind)]
    return [constant(kinds) for kinds in permutations(movable)]


def constant(kinds: Sequence[str]) -> Order:
    """Returns the order that takes the same kind as long as it may go."""
    return lambda shape: kinds


def physical(shape: Shape, limits: Limits) -> Shape:
    """Returns the shape that is computed while `shape` is live: retired units wait for a whole tile to be compacted."""
    return {
        bundle: min(limits.source[bundle], -(-size // limits.tile[bundle]) * limits.tile[bundle])
        for bundle, size in shape.items()
    }


def spans(planned: Sequence[Planned], source: Shape, steps: int) -> list[tuple[Shape, int]]:
    """Returns the live shapes of the first `steps` steps, each with the number of steps that it serves."""
    ends = [*(removal.step for removal in planned), steps]
    shapes = [source, *(removal.shape for removal in planned)]
    lengths = [ends[0], *(after - before for before, after in pairwise(ends))]
    return [(shape, length) for shape, length in zip(shapes, lengths, strict=True) if length > 0]
