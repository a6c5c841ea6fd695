"""Planning: what goes in one optimizer step, on the way to targets that must still be met."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from efficientllm.errors import BudgetError
from efficientllm.pruning.landing import can_land, is_landed
from efficientllm.pruning.saliency import Scores
from efficientllm.pruning.schedule import Pace
from efficientllm.pruning.selection import Order, Queue, Removal, choose_kind, o_columns
from efficientllm.pruning.tracker import UnitTracker
from efficientllm.space.dims import KINDS, Measure, Shape, kind_of, of_kind, shape_text
from efficientllm.space.limits import Limits


@dataclass(frozen=True)
class StepPlan:
    """What goes in one optimizer step.

    Attributes:
        removals: in their order.
        units: what they take, in the present numbering, by dim name.
        next_step: the pace's memory after them.
    """

    removals: list[Removal]
    units: dict[str, list[int]]
    next_step: float


@dataclass
class Planner:
    """Chooses removals by the pace, as long as every target can be met.

    Attributes:
        measure: what targets and pace count.
        targets: sizes to land on, falling, those that are reached taken out by the Pruner.
        last_target: the size that the pace leads to.
    """

    limits: Limits
    measure: Measure
    pace: Pace
    targets: list[int]
    last_target: int

    def is_due(self, step: int, next_step: float, shape: Shape) -> bool:
        """Returns whether the pace asks for a removal from `shape` at an optimizer step."""
        return self.pace.is_due(
            step, next_step, self.measure(shape), self.measure(self.limits.source), self.last_target
        )

    def is_landed(self, shape: Shape) -> bool:
        """Returns whether a shape has the size of the next target."""
        return is_landed(shape, self.limits, self.measure, self.targets[0])

    def plan(
        self, step: int, next_step: float, scores: Scores, tracker: UnitTracker, order: Order | None = None
    ) -> StepPlan:
        """Returns the removals of a step, up to the next target at most.

        Args:
            scores: of every unit, by bundle: (dims, units), infinity for those that are retired.
            order: which kinds go first at a shape; by default the one whose next group is least salient.

        Raises:
            BudgetError: if nothing may go.
        """
        queues = {bundle: Queue(score, tracker.counted(bundle, {})) for bundle, score in scores.items()}
        space, shape = tracker.space, tracker.shape
        removals: list[Removal] = []
        units: dict[str, list[int]] = {}
        while self.is_due(step, next_step, shape):
            bundle = choose_kind(queues, shape, self.limits, self.measure, self.targets, order)
            if bundle is None:
                raise BudgetError(
                    f"no group can be removed from {shape_text(shape)} on the way to a target of {self.targets[0]:,}"
                )
            dims = space.bundles[bundle].dims
            counted = tracker.counted(bundle, units)
            saliencies = {
                kind: lowest for kind in KINDS if (lowest := self._lowest(of_kind(shape, kind), queues)) is not None
            }
            chosen = dict(zip((dim.name for dim in dims), queues[bundle].pop(), strict=True))
            after = {**shape, bundle: shape[bundle] - 1}
            named = tracker.in_source(
                {dim.name: chosen[dim.name] for dim, one in zip(dims, counted, strict=True) if one}
            )
            sizes = space.num_params(shape), space.num_params(after)
            removals.append(Removal(step, kind_of(bundle), named, saliencies, *sizes))
            for name, unit in chosen.items():
                units.setdefault(name, []).append(unit)
            next_step = self.pace.wait(next_step, step, o_columns(bundle, shape, space.head_dim))
            shape = after
            if self.is_landed(shape):
                break  # a saved_size is saved before anything else goes
        return StepPlan(removals, units, next_step)

    def _lowest(self, shape: Shape, queues: Mapping[str, Queue]) -> float | None:
        """Returns the lowest group saliency of the bundles in `shape` that are above their floors, if any is."""
        return min((queues[name].head for name, size in shape.items() if size > self.limits.floor[name]), default=None)


def check_landing(limits: Limits, measure: Measure, targets: Sequence[int]) -> None:
    """Raises BudgetError unless legal shapes, each at or below the one before, land on every target; they fall."""
    source = measure(limits.source)
    for saved_size, size in enumerate(targets):
        before = [each for each in targets[:saved_size] if each < source]
        if size < source and not can_land(limits.source, limits, measure, *before, size):
            first = f", once it has landed on {before[-1]:,}" if before else ""
            raise BudgetError(
                f"target {size:,}: no legal shape lies within one FFN tile below it{first} (tiles "
                f"{shape_text(limits.tile)}; floors {shape_text(limits.floor)}); give another size, "
                "or lower --round-to"
            )


def complete_tiles(kind: str, tracker: UnitTracker, limits: Limits, compaction_tile: int | None) -> dict[str, int]:
    """Returns the tiles of a kind's bundles, none while compaction is dear and can wait.

    Layers that shrink each on its own wait until they have as many complete tiles as there are layers: all together
    are then compacted as often as layers in lockstep.

    Args:
        compaction_tile: units that wait for one compaction, where that is dear.
    """
    bundles = of_kind(tracker.space.shape, kind)
    if kind == "query":
        return dict.fromkeys(bundles, 1)  # query heads cannot wait: they wake up (docs/method.md section 2)
    legal = {bundle: limits.tile[bundle] for bundle in bundles}
    if compaction_tile is None:
        return legal
    units = compaction_tile // tracker.space.head_dim if kind == "kv" else compaction_tile
    # a physical shape is legal too: a checkpoint may be taken there
    tiles = {bundle: max(1, -(-units // tile)) * tile for bundle, tile in legal.items()}
    waiting = tracker.waiting(tiles)
    dims = {bundle: tracker.space.bundles[bundle].dims[0].name for bundle in tiles}
    complete = sum(-(-len(waiting.get(dims[bundle], ())) // tile) for bundle, tile in tiles.items())
    return tiles if complete >= len(tiles) else {}
