"""Pruner: one line that makes any training loop shrink its model.

    pruner = Pruner(model, optimizer, target_params=134_000_000)

It hooks the optimizer's own step: scores come from the weights and gradients that the step is about to use, removals
follow right after it (method.md section 7).
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efficientllm.errors import BudgetError, UnsupportedModelError
from efficientllm.pruning.activations import InputSampler, compensate_
from efficientllm.pruning.norms import LiveNorms
from efficientllm.pruning.relabel import relabel_llama_
from efficientllm.pruning.removal import compact_, count_live_, retire_, survivors
from efficientllm.pruning.saliency import Saliency, Scored, Scores, score_units, smooth
from efficientllm.pruning.schedule import Pace, SlotPace
from efficientllm.pruning.selection import (
    Queue,
    Removal,
    can_land,
    choose_kind,
    is_landed,
    o_columns,
    queue_groups,
)
from efficientllm.space import Limits, find_limits, find_space
from efficientllm.space.dims import Shape
from efficientllm.space.limits import check_target, needs_heads_divide_hidden


class Pruner:
    """Removes minimal parameter groups from a model while an optimizer trains it, until it has the target size.

    Args:
        model: a Hugging Face decoder model of a supported family; replaced parameters stay inside it.
        optimizer: any torch optimizer whose state tensors have their parameter's shape.
        target_params: the size to land on; the result has less than one FFN tile fewer.
        pace: when removals are due: `SlotPace` (the paper's) or `LinearPace(steps, warmup_steps)`.
        saliency, score, score_ema: first order or "fisher"; "output" layers or "all"; decay of a moving average.
        compensate: the second-order update of variant B.
        limits: legal shapes, from `find_limits`; by default rounded to 64 from 10M parameters on.
        compaction_tile: retired units that wait for one compaction; a matter of speed only (default: the limits' tiles).
        save_at: sizes on the way to land on too; `on_landing(size)` is called at each, the target included.

    Attributes:
        removals: every `Removal` so far.
        step: optimizer steps seen.

    Raises:
        BudgetError, UnsupportedModelError: as find_space and check_target do.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        target_params: int,
        *,
        pace: Pace | None = None,
        saliency: Saliency = "first",
        score: Scored = "output",
        score_ema: float = 0.0,
        compensate: bool = False,
        limits: Limits | None = None,
        compaction_tile: int | None = None,
        save_at: Sequence[int] = (),
        on_landing: Callable[[int], None] | None = None,
    ) -> None:
        self.space = find_space(model)
        self.limits = limits or find_limits(self.space, model.config)
        for size in (target_params, *save_at):
            check_target(self.space, self.limits, size, "target")
            if size < self.space.num_params(self.limits.source) and not can_land(
                self.limits.source, self.limits, self.space.num_params, size
            ):
                raise BudgetError(
                    f"target {size:,}: no legal shape lies within one FFN tile under it (tiles {self.limits.tile}, "
                    f"floors {self.limits.floor}); ask for another size, or lower --round-to"
                )
        known = {id(param) for group in optimizer.param_groups for param in group["params"]}
        missing = [name for name, param in model.named_parameters() if id(param) not in known and param.requires_grad]
        if missing:
            raise UnsupportedModelError(
                f"the optimizer does not hold '{missing[0]}' and {len(missing) - 1} more parameters of this model; build "
                "it from model.parameters() before the Pruner"
            )
        self.model, self.optimizer = model, optimizer
        self.pace = pace or SlotPace(slot_steps=1)
        self.saliency, self.scored, self.score_ema = saliency, score, score_ema
        self.compaction_tile = compaction_tile
        self.targets = sorted({target_params, *save_at}, reverse=True)
        self.source_params = self.space.num_params(self.limits.source)
        self.target_params = target_params
        self.on_landing = on_landing
        self.removals: list[Removal] = []
        self.fishers: dict[str, Tensor] | None = None
        self.step = 0
        self.next_step = 0.0
        self._retired: dict[str, list[int]] = {}
        self._origin = {dim.name: list(range(dim.size)) for dim in self.space.dims()}
        self._average: Scores | None = None
        self._planned: list[tuple[Removal, dict[str, int]]] | None = None
        self._norms = LiveNorms()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        relabel_llama_(model)
        self._sampler = InputSampler(model, self.space) if compensate else None
        self._compact_before_saving()
        while self.targets and is_landed(self.shape, self.limits, self.space.num_params, self.targets[0]):
            self.targets.pop(0)  # a target equal to the source is plain training
        if self.done and self._sampler:
            self._sampler.close()

    @property
    def shape(self) -> Shape:
        """Live units of every kind."""
        return {
            kind: bundle.size - len(self._retired.get(bundle.dims[0].name, ()))
            for kind, bundle in self.space.bundles.items()
        }

    @property
    def num_params(self) -> int:
        """Live parameters, tied ones counted once."""
        return self.space.num_params(self.shape)

    @property
    def done(self) -> bool:
        """Whether the target has been reached."""
        return not self.targets

    def is_due(self, step: int) -> bool:
        """Returns whether a removal falls due at an optimizer step."""
        return not self.done and self.pace.is_due(
            step, self.next_step, self.num_params, self.source_params, self.target_params
        )

    def score(self) -> None:
        """Scores the present gradients and plans this step's removals; a loop that clips calls it before it does.

        Without the call the optimizer's own step does it, from the gradients it is given.
        """
        if self._planned is None:
            self._planned = self._plan(self.step + 1)

    def compact(self) -> None:
        """Compacts whatever waits, so that every shape is the stock one of this size."""
        self._compact(list(self.space.bundles))

    def close(self) -> None:
        """Compacts and takes every hook off; the model stays as it is."""
        self.compact()
        for hook in self._hooks:
            hook.remove()
        if self._sampler:
            self._sampler.close()
        self._norms.clear()
        self.model.__dict__.pop("save_pretrained", None)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 and callable(args[1]) else None)
        if closure is None and args and callable(args[0]):
            closure = args[0]
        if closure is None:
            self.score()
            return None

        def scored_closure() -> Any:
            loss = closure()
            self.score()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": scored_closure}
        return tuple(scored_closure if item is closure else item for item in args), kwargs

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step += 1
        planned, self._planned = self._planned or [], None
        if planned:
            self._execute(planned)
        if self._sampler:
            self._sampler.clear()
            if self.done:
                self._sampler.close()

    @torch.no_grad()
    def _plan(self, step: int) -> list[tuple[Removal, dict[str, int]]]:
        """Returns this step's removals with the units that each takes in the present numbering."""
        due = self.is_due(step)
        if self.done or not (due or self.score_ema):
            return []
        params = dict(self.model.named_parameters())
        scores = score_units(
            self.space,
            params,
            {name: param.grad for name, param in params.items()},
            saliency=self.saliency,
            scored=self.scored,
            retired=self._retired,
            fishers=self.fishers,
        )
        if not all(bool(torch.isfinite(score).any(dim=1).all()) for kind, score in scores.items() if kind != "query"):
            return []  # a broken gradient says nothing about any unit
        if self.score_ema:
            self._average = scores = smooth(self._average, scores, self.score_ema)
        if not due:
            return []
        return self._choose(step, self._queues(scores))

    def _queues(self, scores: Scores) -> dict[str, Queue]:
        queues = {}
        for kind, bundle in self.space.bundles.items():
            counted = None
            if kind == "query":
                waiting = {f"layers.{dim.layer}.query.{unit}" for dim in self.space.bundles["kv"].dims
                           for unit in self._retired.get(dim.name, ())}  # fmt: skip
                counted = [dim.name not in waiting for dim in bundle.dims]
            queues[kind] = queue_groups(scores[kind], counted)
        return queues

    def _choose(self, step: int, queues: Mapping[str, Queue]) -> list[tuple[Removal, dict[str, int]]]:
        planned: list[tuple[Removal, dict[str, int]]] = []
        shape, num_params, targets, next_step = self.shape, self.space.num_params, list(self.targets), self.next_step
        while targets and self.pace.is_due(
            step, next_step, num_params(shape), self.source_params, self.target_params
        ):
            kind = choose_kind(queues, shape, self.limits, num_params, targets)
            if kind is None:
                raise BudgetError(f"no group can be removed from {shape} on the way to {targets[0]:,} parameters")
            saliencies = {name: queue.head for name, queue in queues.items() if shape[name] > self.limits.floor[name]}
            chosen = dict(zip((dim.name for dim in self.space.bundles[kind].dims), queues[kind].pop(), strict=True))
            before = num_params(shape)
            next_step = self.pace.wait(next_step, step, o_columns(kind, shape, self.space.head_dim))
            shape = {**shape, kind: shape[kind] - 1}
            units = {name: self._origin[name][unit] for name, unit in chosen.items()}
            planned.append((Removal(step, kind, units, saliencies, before, num_params(shape)), chosen))
            if is_landed(shape, self.limits, num_params, targets[0]):
                break  # a rung is saved before anything else goes
        self.next_step = next_step
        return planned

    def _execute(self, planned: list[tuple[Removal, dict[str, int]]]) -> None:
        units: dict[str, list[int]] = {}
        for removal, chosen in planned:
            self.removals.append(removal)
            for name, unit in chosen.items():
                units.setdefault(name, []).append(unit)
        if self._sampler:
            compensate_(self.model, self.space, units, self._sampler)
        retire_(self.model, self.optimizer, self.space, units)
        for name, chosen_units in units.items():
            self._retired.setdefault(name, []).extend(chosen_units)
        kinds = {removal.kind for removal, _ in planned}
        landed = is_landed(self.shape, self.limits, self.space.num_params, self.targets[0])
        if landed:
            self.compact()
        else:
            self._compact([kind for kind in kinds if kind == "query" or self.shape[kind] % self._tile(kind) == 0])
        if kinds & {"hidden", "kv", "query"}:
            count_live_(self.model, self._norms, self.space, self._retired)
        while self.targets and is_landed(self.shape, self.limits, self.space.num_params, self.targets[0]):
            size = self.targets.pop(0)
            if self.on_landing:
                self.on_landing(size)

    def _tile(self, kind: str) -> int:
        return self.limits.tile[kind] if self.compaction_tile is None else self.compaction_tile

    def _compact(self, kinds: Sequence[str]) -> None:
        """Drops the retired units of some kinds and renumbers everything that names units."""
        dims = [dim for kind in kinds for dim in self.space.bundles[kind].dims if self._retired.get(dim.name)]
        if not dims:
            return
        units = {dim.name: self._retired[dim.name] for dim in dims}
        stay = {dim.name: survivors(dim, units) for dim in self.space.dims()}
        origin = {name: [self._origin[name][unit] for unit in kept] for name, kept in stay.items()}
        compact_(self.model, self.optimizer, self.space, units)
        self._retired = {name: rest for name, rest in self._retired.items() if name not in units}
        if self._average:
            self._average = {
                kind: torch.stack([self._average[kind][row, stay[dim.name]] for row, dim in enumerate(bundle.dims)])
                for kind, bundle in self.space.bundles.items()
            }
        self._drop_queries_of(stay, origin)
        self.space = find_space(self.model)
        count_live_(self.model, self._norms, self.space, self._retired)

    def _drop_queries_of(self, stay: Mapping[str, list[int]], origin: dict[str, list[int]]) -> None:
        """Renumbers the query dims of the KV groups that stay: a KV group takes its query dim along."""
        kv_dims, query_dims = self.space.bundles["kv"].dims, self.space.bundles["query"].dims
        per_layer = len(query_dims) // len(kv_dims)
        rows = [row * per_layer + unit for row, dim in enumerate(kv_dims) for unit in stay[dim.name]]
        queries: dict[str, list[int]] = {}
        for dim in kv_dims:
            for new, old in enumerate(stay[dim.name]):
                queries[f"layers.{dim.layer}.query.{new}"] = origin[f"layers.{dim.layer}.query.{old}"]
        self._origin = {name: value for name, value in origin.items() if ".query." not in name} | queries
        if self._average:
            self._average["query"] = self._average["query"][rows]

    def _compact_before_saving(self) -> None:
        """Lets `model.save_pretrained` compact first: a folder with pending units would load as another function."""
        owner = weakref.ref(self)
        save = self.model.save_pretrained

        def save_pretrained(*args: Any, **kwargs: Any) -> Any:
            pruner = owner()
            if pruner is not None:
                pruner.compact()
                check_saveable(pruner.model.config)
            return save(*args, **kwargs)

        self.model.__dict__["save_pretrained"] = save_pretrained

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a resumed Pruner needs beside model and optimizer: JSON values, and tensors under "average"."""
        return {
            "step": self.step,
            "next_step": self.next_step,
            "source_params": self.source_params,
            "targets": self.targets,
            "limits": vars(self.limits),
            "retired": self._retired,
            "origin": self._origin,
            "average": self._average or {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state; the model must have the shape it had, pending units included (they are zero)."""
        self.step, self.next_step = state["step"], state["next_step"]
        self.source_params, self.targets = state["source_params"], list(state["targets"])
        self.limits = Limits(**state["limits"])
        self._retired = {name: list(units) for name, units in state["retired"].items()}
        self._origin = {name: list(units) for name, units in state["origin"].items()}
        self._average = dict(state["average"]) or None
        count_live_(self.model, self._norms, self.space, self._retired)
        if self.done and self._sampler:
            self._sampler.close()


def check_saveable(config: Any) -> None:
    """Raises UnsupportedModelError if transformers would refuse the config only after it began to write the folder."""
    if needs_heads_divide_hidden(config) and config.hidden_size % config.num_attention_heads:
        raise UnsupportedModelError(
            f"{config.model_type} cannot be saved at hidden size {config.hidden_size} with {config.num_attention_heads} "
            "heads; save when the open tile of hidden dimensions is complete"
        )
