"""RunPlan: the removals, steps and FLOPs of a run before it starts, from the source's config.json alone."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from efficientllm.config.run_config import RunConfig
from efficientllm.errors import BudgetError, ConfigError
from efficientllm.pruning.landing import can_land, is_landed
from efficientllm.pruning.selection import Order
from efficientllm.pruning.trajectory import (
    Planned,
    as_logged,
    extreme_orders,
    one_less,
    physical,
    proportional,
    simulate,
    spans,
)
from efficientllm.space.dims import KINDS, Shape, Space, of_kind, shape_text
from efficientllm.space.limits import Limits
from efficientllm.training.recipe import Recipe
from efficientllm.training.size_target import Budget, params_budget
from efficientllm.training.teacher import pass_flops

if TYPE_CHECKING:
    from efficientllm.delivery.gguf.size import FileSize


@dataclass(frozen=True)
class RunPlan:
    """A run before it starts.

    Attributes:
        planned: every removal, for one order of kinds.
        landed: the index of the removal that lands on each `--save-at`.
        pruning, training: the shapes that are computed up to the last removal and after it, each with its steps.
        flops: of the whole run, every shape at its own cost; `lowest` and `highest` over the orders of kinds.
        masked: FLOPs if the pruning phase only masked, at the source's shape.
        unpruned: FLOPs of as many steps at the source's shape.
        teacher: the space of `--distill`'s; `teaching` the FLOPs of its passes, which the others do not count.
    """

    source: Shape
    planned: list[Planned]
    landed: list[int]
    pruning: list[tuple[Shape, int]]
    training: list[tuple[Shape, int]]
    steps: int
    flops: float
    lowest: float
    highest: float
    masked: float
    unpruned: float
    teacher: Space | None = None
    teaching: float = 0.0

    @property
    def end(self) -> Shape:
        return self.planned[-1].shape if self.planned else self.source

    @property
    def prune_steps(self) -> int:
        """Steps up to the last removal."""
        return self.planned[-1].step if self.planned else 0


def make_plan(
    config: RunConfig,
    space: Space,
    limits: Limits,
    recipe: Recipe,
    kinds: Sequence[str] | None = None,
    budget: Budget | None = None,
    teacher: Space | None = None,
) -> RunPlan:
    """Returns the plan of a run; `kinds` is the order of removals to follow, by default all kinds go in proportion.

    Raises:
        BudgetError: if no legal shape lies within one FFN tile under a target.
    """
    source = limits.source
    budget = budget or params_budget(config, space, limits)
    measure = budget.measure
    targets = {budget.target, *config.save_at}
    for target in targets:
        if target < measure(source) and not can_land(source, limits, measure, target):
            raise BudgetError(
                f"--target-params {target:,}: no legal shape lies within one FFN tile below it (tiles "
                f"{shape_text(limits.tile)}; floors {shape_text(limits.floor)}); give another size, or lower "
                "--round-to"
            )

    def run(order: Order) -> list[Planned]:
        return simulate(measure, limits, targets, recipe.pace, space.head_dim, order)

    def flops(planned: Sequence[Planned]) -> float:
        steps = max(recipe.total_steps, planned[-1].step if planned else 0)
        return config.batch_tokens * steps_flops(space, limits, planned, steps, config.seq_len)

    planned = run(proportional(limits) if kinds is None else as_logged(kinds, limits))
    total = flops(planned)
    orders = extreme_orders(limits) if kinds is None else [proportional(limits), *extreme_orders(limits)]
    others = [flops(run(order)) for order in orders]
    pruning, end = (planned[-1].step, planned[-1].shape) if planned else (0, source)
    steps = max(recipe.total_steps, pruning)
    before, after = (config.batch_tokens * space.flops_per_token(shape, config.seq_len) for shape in (source, end))
    return RunPlan(
        source=source,
        planned=planned,
        landed=[
            next(index for index, each in enumerate(planned) if is_landed(each.shape, limits, measure, size))
            for size in config.save_at
            if size < measure(source)
        ],
        pruning=computed(limits, planned, pruning),
        training=[(physical(end, limits), steps - pruning)],
        steps=steps,
        flops=total,
        lowest=min(total, *others),
        highest=max(total, *others),
        masked=before * pruning + after * (steps - pruning),
        unpruned=before * steps,
        teacher=teacher,
        teaching=config.batch_tokens * pass_flops(teacher, config.seq_len) * steps,
    )


def steps_flops(space: Space, limits: Limits, planned: Sequence[Planned], steps: int, seq_len: int) -> float:
    """Returns the FLOPs of a token at every one of `steps` steps, summed: those of the shape that is computed then."""
    return sum(space.flops_per_token(shape, seq_len) * length for shape, length in computed(limits, planned, steps))


def computed(limits: Limits, planned: Sequence[Planned], steps: int) -> list[tuple[Shape, int]]:
    """Returns the shapes that are computed in the first `steps` steps, each with the number of steps."""
    lengths: Counter[tuple[int, ...]] = Counter()
    for shape, length in spans(planned, limits.source, steps):
        sizes = physical(shape, limits)
        lengths[tuple(sizes.values())] += length
    return [(dict(zip(limits.source, sizes, strict=True)), length) for sizes, length in lengths.items()]


def unrounded(space: Space, limits: Limits, file: "FileSize", params: int, num_bytes: int) -> tuple[int, int]:
    """Returns what a run without rounding would end with, all kinds in proportion.

    Returns:
        bytes of the first shape with at most `params` parameters, and parameters of the first in `num_bytes` bytes.
    """
    order = proportional(limits)
    shape = limits.source
    found_bytes = found_params = None
    while found_bytes is None or found_params is None:
        if found_bytes is None and space.num_params(shape) <= params:
            found_bytes = file.written(shape)
        if found_params is None and file.written(shape) <= num_bytes:
            found_params = space.num_params(shape)
        able = (
            [name for name, size in of_kind(shape, kind).items() if size > limits.floor[name]] for kind in order(shape)
        )
        bundles = next((names for names in able if names), None)
        if bundles is None:
            break
        shape = one_less(shape, bundles)
    return found_bytes or file.written(shape), found_params or 0


def read_kinds(run: str) -> list[str]:
    """Returns the kinds of a run's removals in their order.

    Raises:
        ConfigError: if the run has no log, or a line of it is not a removal.
    """
    path = Path(run).expanduser() / "removals.jsonl"
    kinds = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            kind = json.loads(line)["kind"]
            if kind not in KINDS:
                raise ConfigError(f"--like {run}: line {number} of {path.name} has kind '{kind}', not one of {KINDS}")
            kinds.append(kind)
    except OSError as error:
        raise ConfigError(f"--like {run}: {path} cannot be read ({error.strerror}); name a run folder") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--like {run}: line {number} of {path.name} is not a removal; fix the line, or cut the log before it"
        ) from None
    return kinds
