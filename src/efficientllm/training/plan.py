"""`efficientllm plan`: what a run will do and need, from the source's config.json alone."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from efficientllm.errors import BudgetError, ConfigError
from efficientllm.numbers import format_count
from efficientllm.pruning.schedule import LinearPace
from efficientllm.pruning.selection import can_land, is_landed
from efficientllm.pruning.trajectory import (
    Order,
    Planned,
    as_logged,
    extreme_orders,
    physical,
    proportional,
    simulate,
    spans,
)
from efficientllm.space.dims import KINDS, Shape, Space
from efficientllm.space.limits import Limits
from efficientllm.training.config import RunConfig
from efficientllm.training.device import find_device, memory_bytes
from efficientllm.training.memory import Memory, estimate, fitting_micro_batch
from efficientllm.training.recipe import Recipe, make_recipe
from efficientllm.training.source import open_space

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 8  # shapes shown from the source to the end


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
        planned: every removal, for one order of kinds.
        landed: the index of the removal that lands on each `--save-at`.
        flops: of the whole run, every shape at its own cost; `lowest` and `highest` over the orders of kinds.
        masked: FLOPs if the pruning phase only masked, at the source's shape.
        unpruned: FLOPs of as many steps at the source's shape.
    """

    source: Shape
    planned: list[Planned]
    landed: list[int]
    steps: int
    flops: float
    lowest: float
    highest: float
    masked: float
    unpruned: float
    memory: Memory

    @property
    def end(self) -> Shape:
        return self.planned[-1].shape if self.planned else self.source

    @property
    def prune_steps(self) -> int:
        """Steps up to the last removal."""
        return self.planned[-1].step if self.planned else 0


def print_plan(config: RunConfig, like: str | None = None) -> int:
    """Prints the plan of a run; `like` is a run folder whose order of removals is taken. Returns the exit code.

    Raises:
        UnsupportedModelError, BudgetError, ConfigError: as `open_space`, `make_recipe`, `read_kinds` and `make_plan`.
    """
    from rich.console import Console

    _, space, limits = open_space(config)
    recipe = make_recipe(config, space, limits)
    micro_batch_size = config.micro_batch_size or fitting_micro_batch(
        space,
        limits.source,
        rows=recipe.batch_rows,
        seq_len=config.seq_len,
        memory_bytes=memory_bytes(find_device()),
        compensate=config.compensate,
        fisher=config.saliency == "fisher",
        activation_checkpointing=config.activation_checkpointing,
    )
    kinds = read_kinds(like) if like is not None else None
    plan = make_plan(config, space, limits, recipe, micro_batch_size, kinds)
    order = "assumed, all kinds in proportion" if like is None else f"as in {like}, then in proportion"
    console = Console(highlight=False)

    def say(line: str = "") -> None:
        console.print(line, markup=False, soft_wrap=True)

    say(f"{config.model}: {_sizes(limits.source, space)}")
    say(f"ends as: {_sizes(plan.end, space)}")
    say()
    say(f"Shapes on the way (order of removals: {order})")
    console.print(shape_table(plan, space, config))
    for line in [*schedule_lines(plan, config, recipe), "", *flops_lines(plan)]:
        say(line)
    say()
    for line in memory_lines(plan.memory, config, micro_batch_size, recipe):
        say(line)
    for remark in recipe.remarks:
        say(f"note: {remark}")
    return 0


def make_plan(
    config: RunConfig,
    space: Space,
    limits: Limits,
    recipe: Recipe,
    micro_batch_size: int,
    kinds: Sequence[str] | None = None,
) -> Plan:
    """Returns the plan of a run; `kinds` is the order of removals to follow, by default all kinds go in proportion.

    Raises:
        BudgetError: if no legal shape lies within one FFN tile under a target.
    """
    source = limits.source
    targets = {config.target_params or space.num_params(source), *config.save_at}
    for target in targets:
        if target < space.num_params(source) and not can_land(source, limits, space.num_params, target):
            raise BudgetError(
                f"--target-params {target:,}: no legal shape lies within one FFN tile under it (tiles {limits.tile}, "
                f"floors {limits.floor}); ask for another size, or lower --round-to"
            )

    def run(order: Order) -> list[Planned]:
        return simulate(space.num_params, limits, targets, recipe.pace, space.head_dim, order)

    def flops(planned: Sequence[Planned]) -> float:
        steps = max(recipe.total_steps, planned[-1].step if planned else 0)
        return config.batch_tokens * steps_flops(space, limits, planned, steps, config.seq_len)

    planned = run(proportional(limits) if kinds is None else as_logged(kinds, limits))
    total = flops(planned)
    others = [flops(run(order)) for order in [proportional(limits), *extreme_orders(limits)]]
    pruning, end = (planned[-1].step, planned[-1].shape) if planned else (0, source)
    steps = max(recipe.total_steps, pruning)
    before, after = (config.batch_tokens * space.flops_per_token(shape, config.seq_len) for shape in (source, end))
    return Plan(
        source=source,
        planned=planned,
        landed=[
            next(index for index, each in enumerate(planned) if is_landed(each.shape, limits, space.num_params, size))
            for size in config.save_at
            if size < space.num_params(source)
        ],
        steps=steps,
        flops=total,
        lowest=min(total, *others),
        highest=max(total, *others),
        masked=before * pruning + after * (steps - pruning),
        unpruned=before * steps,
        memory=estimate(
            space,
            source,
            micro_batch_size=micro_batch_size,
            seq_len=config.seq_len,
            batch_rows=recipe.batch_rows,
            compensate=config.compensate,
            fisher=config.saliency == "fisher",
            activation_checkpointing=config.activation_checkpointing,
        ),
    )


def steps_flops(space: Space, limits: Limits, planned: Sequence[Planned], steps: int, seq_len: int) -> float:
    """Returns the FLOPs of a token at every one of `steps` steps, summed: those of the shape that is computed then."""
    lengths: Counter[tuple[int, ...]] = Counter()
    for shape, length in spans(planned, limits.source, steps):
        computed = physical(shape, limits)
        lengths[tuple(computed[kind] for kind in KINDS)] += length
    return sum(
        space.flops_per_token(dict(zip(KINDS, sizes, strict=True)), seq_len) * length
        for sizes, length in lengths.items()
    )


def read_kinds(run: str) -> list[str]:
    """Returns the kinds of a run's removals in their order.

    Raises:
        ConfigError: if the run has no log, or a line of it is no removal.
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
            f"--like {run}: line {number} of {path.name} is no removal; mend or shorten the log"
        ) from None
    return kinds


def shape_table(plan: Plan, space: Space, config: RunConfig) -> "Table":
    """Returns the shapes on the way: source, end, every `--save-at`, and some between in even steps of parameters."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("step", "tokens", "hidden", "ffn", "heads", "kv heads", "params", ""):
        table.add_column(name, justify="right")
    picked = sorted({*milestones(plan.planned, space.num_params(plan.source)), *plan.landed})
    points = [Planned(0, "", plan.source, space.num_params(plan.source)), *(plan.planned[index] for index in picked)]
    marks = ["", *("saved" if index in plan.landed else "" for index in picked)]
    for point, mark in zip(points, marks, strict=True):
        shape = point.shape
        table.add_row(
            f"{point.step:,}",
            format_count(point.step * config.batch_tokens),
            f"{shape['hidden']:,}",
            f"{shape['ffn']:,}",
            f"{shape['kv'] * shape['query']}",
            f"{shape['kv']}",
            f"{point.params:,}",
            mark,
        )
    return table


def milestones(planned: Sequence[Planned], source: int) -> list[int]:
    """Returns the indices of up to ROWS - 1 removals, the last one's and some before it, even in parameters."""
    if not planned:
        return []
    end = planned[-1].params
    wanted = [source - (source - end) * row / (ROWS - 1) for row in range(1, ROWS)]
    return sorted({next(i for i, removal in enumerate(planned) if removal.params <= size) for size in wanted})


def schedule_lines(plan: Plan, config: RunConfig, recipe: Recipe) -> list[str]:
    """Returns the removals, steps and tokens of the two phases, and the learning rate."""
    counts = Counter(removal.kind for removal in plan.planned)
    kinds = ", ".join(f"{kind} {counts[kind]:,}" for kind in KINDS if counts[kind])
    after = plan.steps - plan.prune_steps
    pace = recipe.pace
    if isinstance(pace, LinearPace):
        how = "parameters fall in a line"
    else:
        how = f"{pace.slot_steps:g} steps a {'removal' if pace.equal else 'slot'}"
    return [
        f"removals   {len(plan.planned):,}" + (f" ({kinds})" if kinds else ""),
        f"pruning    {_phase(plan.prune_steps, config)}; {how}, after {recipe.warmup_steps:,} of warm-up",
        f"after it   {_phase(after, config)}",
        f"in all     {_phase(plan.steps, config)} of {format_count(config.batch_tokens)} tokens each",
        f"peak lr    {recipe.lr:g} ({recipe.lr_reason})",
    ]


def flops_lines(plan: Plan) -> list[str]:
    """Returns the FLOPs of the run beside those of the two ways without it."""

    def beside(flops: float) -> str:
        return f"{flops:.3g} ({flops / plan.flops:.2f} times)" if plan.flops else f"{flops:.3g}"

    return [
        f"FLOPs      {plan.flops:.3g}; {plan.lowest:.3g} to {plan.highest:.3g} over the orders of kinds",
        f"           {beside(plan.masked)} if the pruning phase only masked",
        f"           {beside(plan.unpruned)} without pruning",
    ]


def memory_lines(memory: Memory, config: RunConfig, micro_batch_size: int, recipe: Recipe) -> list[str]:
    """Returns the peak memory, its parts, and what the second-order update takes of it."""
    rows = f"{micro_batch_size} of {recipe.batch_rows} rows a pass, {config.seq_len} tokens each, float32"
    lines = [f"memory     about {_bytes(memory.peak)} at the peak ({rows})"]
    lines += [f"           {_bytes(size):>8} {name}" for name, size in memory.parts().items()]
    if config.compensate:
        lines.append(
            f"second-order update: {_bytes(memory.second_order)}: samples, and the solve of one layer at a time "
            "when activations are gone"
        )
    return lines


def _sizes(shape: Shape, space: Space) -> str:
    heads = shape["kv"] * shape["query"]
    return (
        f"{space.num_params(shape):,} parameters; hidden {shape['hidden']:,}, ffn {shape['ffn']:,}, "
        f"{heads} heads, {shape['kv']} kv heads"
    )


def _phase(steps: int, config: RunConfig) -> str:
    return f"{steps:,} steps, {format_count(steps * config.batch_tokens)} tokens"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
