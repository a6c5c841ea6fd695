"""Pruner: one line that makes any training loop shrink its model.

    pruner = Pruner(model, optimizer, target_params=134_000_000)

It hooks the optimizer's own step: scores come from the weights and gradients that the step is about to use, removals
follow right after it (docs/method.md section 7).
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from efficientllm.errors import UnsupportedModelError
from efficientllm.models.llama_mistral import relabel_llama_
from efficientllm.numbers import counted
from efficientllm.pruning.activations import InputSampler, compensate_
from efficientllm.pruning.norms import LiveNorms
from efficientllm.pruning.placement import Placement
from efficientllm.pruning.planner import Planner, StepPlan, check_landing, complete_tiles
from efficientllm.pruning.removal import check_state, count_live_, retire_
from efficientllm.pruning.saliency import Retired, Saliency, Scored, Scores
from efficientllm.pruning.saving import call_before_saving, save_as_before
from efficientllm.pruning.schedule import Pace, SlotPace
from efficientllm.pruning.scoring import Scorer
from efficientllm.pruning.selection import Order, Removal
from efficientllm.pruning.tracker import UnitTracker
from efficientllm.space import Limits, find_limits, find_space
from efficientllm.space.dims import Measure, Shape, Space
from efficientllm.space.limits import check_target


class Pruner:
    """Removes minimal parameter groups from a model while an optimizer trains it, until it has the target size.

    It is built once, before the first step, and works by itself: every `optimizer.step()` scores the units, updates the
    weights and removes what is due. The loop stays as it was. `model.save_pretrained` saves the stock model of whatever
    size has been reached.

    Args:
        model: a Hugging Face decoder model of a supported family. Parameters are replaced inside it as it shrinks.
        optimizer: any torch optimizer whose state tensors have their parameter's shape; it must hold every parameter of
            the model that is trained.
        target_params: the size to land on; the result has less than one FFN tile fewer.
        measure: what targets, landing and pace count instead of parameters: the bytes of a file, say.
        pace: when removals are due: `LinearPace(steps, warmup_steps)`, or `SlotPace`, the paper's (the default, with
            slots of one step).
        saliency: "taylor1", the mean of abs(w·g), or "taylor2", with the diagonal Fisher's second-order term ("first"
            and "fisher" until 0.2).
        score: the matrices that are scored: "output", those that write to the residual stream, or "all".
        score_ema: decay of a moving average of the saliency, from 0 (none) to below 1; for small batches.
        compensate: whether the layers that read a unit are updated when it goes, by least squares (variant B).
        per_layer: whether layers shrink each on its own and may end with different widths: a minimal parameter group is
            then one layer's. A model whose layers differ at the end is saved with a small file of remote code.
        limits: legal shapes, from `find_limits` of the space of that layout; by default widths are multiples of 64 from
            10M parameters on, and free below.
        compaction_tile: retired channels (as many columns of O, for heads) that wait for one compaction, a matter of
            speed (default: the limits' tiles).
        save_at: sizes on the way to land on too.
        on_landing: called as `on_landing(size)` at each of `save_at` and at the target.
        placement: where the model's tensors are (default: here, whole).

    Attributes:
        removals: every `Removal` so far.
        step: optimizer steps seen.
        model: the model; under FSDP another object after every compaction.
        scorer: what scores the gradients; its `fishers` may be set before each step.

    Raises:
        BudgetError: if the target is above the source or below the smallest legal shape.
        UnsupportedModelError: if the family cannot be pruned, or the optimizer does not hold the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        target_params: int,
        *,
        measure: Measure | None = None,
        pace: Pace | None = None,
        saliency: Saliency | Literal["first", "fisher"] = "taylor1",
        score: Scored = "output",
        score_ema: float = 0.0,
        compensate: bool = False,
        per_layer: bool = False,
        limits: Limits | None = None,
        compaction_tile: int | None = None,
        save_at: Sequence[int] = (),
        on_landing: Callable[[int], None] | None = None,
        placement: Placement | None = None,
    ) -> None:
        space = find_space(model, per_layer)
        self.limits = limits or find_limits(space, model.config)
        self.targets = sorted({target_params, *save_at}, reverse=True)
        self.source_params = space.num_params(self.limits.source)
        self.measure = measure or space.num_params
        self.source_size = self.measure(self.limits.source)
        if measure is None:
            for size in self.targets:
                check_target(space, self.limits, size, "target")
        check_landing(self.limits, self.measure, self.targets)
        known = {id(param) for group in optimizer.param_groups for param in group["params"]}
        missing = [name for name, param in model.named_parameters() if id(param) not in known and param.requires_grad]
        if missing:
            raise UnsupportedModelError(
                f"the optimizer does not hold {counted(len(missing), 'parameter')} of this model, such as "
                f"'{missing[0]}'; build it from model.parameters() before the Pruner"
            )
        self.model, self.optimizer = model, optimizer
        self.placement, self.per_layer = placement or Placement(), per_layer
        self.pace = pace or SlotPace(slot_steps=1)
        self.compaction_tile = compaction_tile
        self.target_params = target_params
        self.on_landing = on_landing
        self.removals: list[Removal] = []
        self.step = 0
        self.next_step = 0.0
        self.tracker = UnitTracker(space)
        self._planner = self._make_planner()
        order: Any = {"first": "taylor1", "fisher": "taylor2"}.get(saliency, saliency)
        self.scorer = Scorer(self.tracker, self.placement, order, score, score_ema)
        self._norms = LiveNorms(self.placement.compiles)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        relabel_llama_(model)
        self.sampler = InputSampler(model, space) if compensate else None
        self._compact_before_saving()
        while self.targets and self._planner.is_landed(self.shape):
            self.targets.pop(0)  # a target equal to the source is plain training
        count_live_(model, self._norms, space, {})
        self._rest_if_done()

    @property
    def space(self) -> Space:
        """The pruning space at the model's present physical shape."""
        return self.tracker.space

    @property
    def shape(self) -> Shape:
        """Live units of every bundle."""
        return self.tracker.shape

    @property
    def num_params(self) -> int:
        """Live parameters, tied ones counted once."""
        return self.space.num_params(self.shape)

    @property
    def retired(self) -> Retired:
        """Units that are zero but not yet compacted, by dim name."""
        return self.tracker.retired

    def source_units(self, name: str) -> list[int | None]:
        """Returns the source's index of every physical unit of a dim, None for one that is retired."""
        retired = set(self.tracker.retired.get(name, ()))
        return [None if unit in retired else index for unit, index in enumerate(self.tracker.origin[name])]

    @property
    def done(self) -> bool:
        """Whether the target has been reached."""
        return not self.targets

    def is_due(self, step: int) -> bool:
        """Returns whether a removal falls due at an optimizer step."""
        return not self.done and self._planner.is_due(step, self.next_step, self.shape)

    def score(self) -> None:
        """Scores the present gradients for this step's removals; a loop that clips calls it before it does.

        Without the call the optimizer's own step does it, from the gradients it is given. Scores whose step is skipped
        are replaced by the next call's.
        """
        if not self.done:
            self.scorer.score(self.model, self.is_due(self.step + 1))

    def remove(self, scores: Scores, step: int, order: Order | None = None) -> None:
        """Removes, between the optimizer's steps, what the pace would have gone by its step `step`.

        Args:
            scores: of every unit, by kind: (dims, units), infinity for those that are retired.
            order: which kinds go first at a shape; by default the one whose next group is least salient.
        """
        plan = self._planner.plan(step, self.next_step, scores, self.tracker, order)
        self._execute(replace(plan, removals=[replace(removal, step=self.step) for removal in plan.removals]))
        self.forget_inputs()
        self._rest_if_done()

    def forget_inputs(self) -> None:
        """Drops the layer inputs kept since the last step: the pass that they come from is done again."""
        if self.sampler:
            self.sampler.clear()

    def compact(self) -> None:
        """Compacts everything that waits, so that every shape is the stock one of this size."""
        self._compact(dict.fromkeys(self.space.bundles, 1))

    def close(self) -> None:
        """Compacts and takes every hook off; the model stays as it is."""
        self.compact()
        for hook in self._hooks:
            hook.remove()
        if self.sampler:
            self.sampler.close()
        self._norms.clear()
        save_as_before(self.model)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Scores, at once or inside the closure that will make the gradients; torch passes the optimizer as args[0]."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._score_once()
            return None

        def scored_closure() -> Any:
            loss = closure()
            self._score_once()
            return loss

        return args[:1], {**kwargs, "closure": scored_closure}

    def _score_once(self) -> None:
        if not self.scorer.is_scored:
            self.score()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step += 1
        scores = self.scorer.take(self.is_due(self.step))
        if scores is not None:
            self._execute(self._planner.plan(self.step, self.next_step, scores, self.tracker))
        self.forget_inputs()
        self._rest_if_done()

    def _execute(self, plan: StepPlan) -> None:
        if not self.removals:
            check_state(self.optimizer)  # what it keeps does not change
        self.placement.check_same(plan.removals)
        if self.sampler:
            compensate_(self.model, self.space, plan.units, self.sampler, self.placement)
        retire_(self.model, self.optimizer, self.space, plan.units, self.placement.local, self.placement.first_row)
        self.tracker.retire(plan.units)
        self.removals += plan.removals
        self.next_step = plan.next_step
        kinds = {removal.kind for removal in plan.removals}
        if self._planner.is_landed(self.shape):
            self.compact()
        else:
            found = (complete_tiles(kind, self.tracker, self.limits, self.compaction_tile) for kind in kinds)
            self._compact({bundle: tile for tiles in found for bundle, tile in tiles.items()})
        if any(slot.role == "rider" for dim in self.space.dims() if dim.kind in kinds for slot in dim.slots):
            count_live_(self.model, self._norms, self.space, self.tracker.retired)
        while self.targets and self._planner.is_landed(self.shape):
            size = self.targets.pop(0)
            if self.on_landing:
                self.on_landing(size)

    def _compact(self, tiles: Mapping[str, int]) -> None:
        units = self.tracker.waiting(tiles)
        if units:
            self.scorer.look()  # before units are renumbered
            model = self.placement.compact(self.model, self.optimizer, self.space, units)
            if model is not self.model:
                self._move_to(model)
            self.tracker.renumber(units, find_space(self.model, self.per_layer))
            count_live_(self.model, self._norms, self.space, self.tracker.retired)

    def _move_to(self, model: nn.Module) -> None:
        """Continues with a model that was rebuilt at the smaller shape."""
        save_as_before(self.model)
        self.model = model
        self._norms = LiveNorms(self.placement.compiles)
        if self.sampler:
            self.sampler.close()
            self.sampler = InputSampler(model, find_space(model, self.per_layer))
        self._compact_before_saving()

    def _compact_before_saving(self) -> None:
        owner = weakref.ref(self)

        def compact(saved: nn.Module) -> None:
            pruner = owner()
            if pruner is not None and pruner.model is saved:
                pruner.compact()

        call_before_saving(self.model, compact)

    def _make_planner(self) -> Planner:
        return Planner(self.limits, self.measure, self.pace, self.targets, self.target_params)

    def _rest_if_done(self) -> None:
        if self.done:
            self._norms.clear()
            if self.sampler:
                self.sampler.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a resumed Pruner needs beside model and optimizer: JSON values, and tensors in "average"."""
        self.scorer.look()
        return {
            "step": self.step,
            "next_step": self.next_step,
            "source_params": self.source_params,
            "targets": list(self.targets),
            "limits": asdict(self.limits),
            **self.tracker.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state; the model must have the shape it had, pending units included (they are zero).

        Raises:
            CheckpointError: if it has another.
        """
        self.tracker.load_state_dict(state)
        self.step, self.next_step = state["step"], state["next_step"]
        self.source_params, self.targets = state["source_params"], list(state["targets"])
        self.limits = Limits(**state["limits"])
        self.source_size = self.measure(self.limits.source)
        self._planner = self._make_planner()
        self.scorer.clear()
        count_live_(self.model, self._norms, self.space, self.tracker.retired)
        self._rest_if_done()
