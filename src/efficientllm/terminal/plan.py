"""`efficientllm plan`: what a run will do and need, from the source's config.json alone."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from efficientllm.config.run_config import RunConfig
from efficientllm.distributed.device import default_checkpointing, default_precision, find_device, memory_bytes
from efficientllm.models.load import load_tokenizer
from efficientllm.numbers import format_count
from efficientllm.planning.gpus import Cluster
from efficientllm.planning.run_plan import RunPlan, make_plan, read_kinds, unrounded
from efficientllm.pruning.schedule import LinearPace
from efficientllm.pruning.trajectory import Planned
from efficientllm.run.source import floors, open_start
from efficientllm.space.dims import KINDS, Shape, Space, of_kind, size_text, widths
from efficientllm.space.limits import Limits, find_limits
from efficientllm.terminal.cluster import cluster_parts
from efficientllm.training.memory_estimate import PassSetup, estimate, fitting_micro_batch
from efficientllm.training.recipe import Recipe, make_recipe
from efficientllm.training.size_target import Budget, open_budget, params_budget
from efficientllm.training.teacher import open_teacher, pass_flops

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 8  # shapes shown from the source to the end


def print_plan(config: RunConfig, like: str | None = None, cluster: Cluster | None = None) -> int:
    """Prints the plan of a run; returns the exit code.

    Args:
        like: run folder whose order of removals is taken.
        cluster: GPUs that the run would have; without them the memory is that of a run on this machine.

    Raises:
        UnsupportedModelError, BudgetError, ConfigError: as `open_start`, `make_recipe`, `read_kinds`, `make_plan` and
            `make_setup`.
    """
    from rich.console import Console

    empty, space, limits = open_start(config)
    budget = params_budget(config, space, limits)
    if config.for_type is not None:
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        budget = open_budget(config, empty, space, limits, tokenizer)
    recipe = make_recipe(config, space, limits, budget)
    kinds = read_kinds(like) if like is not None else None
    plan = make_plan(config, space, limits, recipe, kinds, budget, open_teacher(config, space))
    order = "assumed, all kinds in proportion" if like is None else f"as in {like}, then in proportion"
    parts = [
        f"{config.model}: {_sizes(limits.source, space, budget)}",
        f"ends as: {_sizes(plan.end, space, budget)}",
        "",
        f"Shapes on the way (order of removals: {order})",
        shape_table(plan, space, config, budget),
        *rounding_lines(plan, space, find_limits(space, empty.config, round_to=1, **floors(config)), budget),
        *schedule_lines(plan, config, recipe),
        "",
        *flops_lines(plan),
        *teacher_lines(plan, config, space),
        "",
        *(
            cluster_parts(plan, config, cluster, space)
            if cluster
            else here_lines(config, space, limits, recipe, plan.teacher)
        ),
        *(f"note: {remark}" for remark in recipe.remarks),
    ]
    console = Console(highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        else:
            console.print(part)
    return 0


def shape_table(plan: RunPlan, space: Space, config: RunConfig, budget: Budget) -> "Table":
    """Returns the shapes on the way: source, end, every `--save-at`, and some between in even steps of size."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    file = budget.file
    sizes = ("params", file.type) if file else ("params",)
    for name in ("step", "tokens", "hidden", "ffn", "heads", "kv heads", *sizes, ""):
        table.add_column(name, justify="right")
    picked = sorted({*milestones(plan.planned, budget.measure(plan.source)), *plan.landed})
    points = [Planned(0, "", plan.source, budget.measure(plan.source)), *(plan.planned[index] for index in picked)]
    marks = ["", *("saved" if index in plan.landed else "" for index in picked)]
    for point, mark in zip(points, marks, strict=True):
        table.add_row(
            f"{point.step:,}",
            format_count(point.step * config.batch_tokens),
            *(size_text(size) for size in widths(point.shape).values()),
            f"{space.num_params(point.shape):,}",
            *([_bytes(file(point.shape))] if file else []),
            mark,
        )
    return table


def milestones(planned: Sequence[Planned], source: int) -> list[int]:
    """Returns the indices of up to ROWS - 1 removals, the last one's and some before it, even in size."""
    if not planned:
        return []
    end = planned[-1].size
    wanted = [source - (source - end) * row / (ROWS - 1) for row in range(1, ROWS)]
    return sorted({next(i for i, removal in enumerate(planned) if removal.size <= size) for size in wanted})


def schedule_lines(plan: RunPlan, config: RunConfig, recipe: Recipe) -> list[str]:
    """Returns the removals, steps and tokens of the two phases, and the learning rate."""
    counts: Counter[str] = Counter()
    for planned in plan.planned:
        counts[planned.kind] += planned.removals
    kinds = ", ".join(f"{kind} {counts[kind]:,}" for kind in KINDS if counts[kind])
    after = plan.steps - plan.prune_steps
    pace = recipe.pace
    if isinstance(pace, LinearPace):
        how = f"{'bytes' if config.target_bytes else 'parameters'} fall linearly"
    else:
        how = f"{pace.slot_steps:g} steps per {'removal' if pace.equal else 'slot'}"
    return [
        f"removals   {counts.total():,}" + (f" ({kinds})" if kinds else ""),
        f"pruning    {_phase(plan.prune_steps, config)}; {how}, after {recipe.warmup_steps:,} warm-up steps",
        f"afterwards {_phase(after, config)}",
        f"total      {_phase(plan.steps, config)} of {format_count(config.batch_tokens)} tokens each",
        f"peak lr    {recipe.lr:g} ({recipe.lr_reason})",
    ]


def rounding_lines(plan: RunPlan, space: Space, limits: Limits, budget: Budget) -> list[str]:
    """Returns what rounding for `--for` costs in parameters and saves in bytes.

    Args:
        limits: without rounding.
    """
    file, end = budget.file, plan.end
    if file is None or not plan.planned or max(file.limits.tile.values()) == 1:
        return []
    params, num_bytes = space.num_params(end), file(end)
    left = budget.target - budget.measure(end)
    left = left * params // num_bytes if budget.measure is file else left
    room = budget.target if budget.measure is file else num_bytes
    needed, held = unrounded(space, limits, file, params, room)
    sizes = ((kind, max(of_kind(file.limits.tile, kind).values())) for kind in KINDS)
    tiles = ", ".join(f"{kind} {size}" for kind, size in sizes if size > 1)
    return [
        f"rounding   to multiples (tiles) of {tiles}: about {left:,} parameters below what the target allows;",
        f"           without it about as many parameters take {needed:,} bytes instead of {num_bytes:,}, and {room:,} "
        f"bytes hold {held:,} parameters instead of {params:,}",
    ]


def flops_lines(plan: RunPlan) -> list[str]:
    """Returns the FLOPs of the run beside those of the two ways without it."""

    def beside(flops: float) -> str:
        return f"{flops:.3g} ({flops / plan.flops:.2f} times)" if plan.flops else f"{flops:.3g}"

    return [
        f"FLOPs      {plan.flops:.3g}; {plan.lowest:.3g} to {plan.highest:.3g} depending on the order of removals",
        f"           {beside(plan.masked)} if the pruning phase only masked",
        f"           {beside(plan.unpruned)} without pruning",
    ]


def teacher_lines(plan: RunPlan, config: RunConfig, space: Space) -> list[str]:
    """Returns what a teacher's forward passes cost beside the run."""
    if plan.teacher is None:
        return []
    passes, params = pass_flops(plan.teacher, config.seq_len), plan.teacher.num_params(plan.teacher.shape)
    at_source, at_end = (passes / space.flops_per_token(shape, config.seq_len) for shape in (plan.source, plan.end))
    return [
        f"teacher    {plan.teaching:.3g} more for the forward passes of {params:,} parameters:",
        f"           {at_source:.2f} of a step at the source's shape, {at_end:.2f} at the end's",
    ]


def here_lines(
    config: RunConfig, space: Space, limits: Limits, recipe: Recipe, teacher: Space | None = None
) -> list[str]:
    """Returns the peak memory of a run in one process on this machine, its parts, and the second-order update's."""
    device = find_device()
    params = space.num_params(limits.source)
    precision = config.precision or default_precision(device, params)
    again = config.activation_checkpointing or default_checkpointing(device, params, precision, config.compile)
    setup = PassSetup.of_run(config, precision, activation_checkpointing=again, teacher=teacher, device=device.type)
    micro_batch_size = config.micro_batch_size or fitting_micro_batch(
        space, limits.source, setup, rows=recipe.batch_rows, memory_bytes=memory_bytes(device)
    )
    memory = estimate(space, limits.source, setup, micro_batch_size=micro_batch_size, batch_rows=recipe.batch_rows)
    rows = f"{micro_batch_size} of {recipe.batch_rows} rows per pass, {config.seq_len} tokens each, {precision}"
    lines = [f"memory     about {_bytes(memory.peak)} at the peak in one process here ({rows})"]
    lines += [f"           {_bytes(size):>8} {name.replace('_', ' ')}" for name, size in memory.parts().items()]
    if config.compensate:
        lines.append(
            f"second-order update: {_bytes(memory.second_order)}: samples, and the solution for one layer at a time "
            "once activations are freed"
        )
    return lines


def _sizes(shape: Shape, space: Space, budget: Budget) -> str:
    hidden, ffn, heads, kv = (size_text(size) for size in widths(shape).values())
    file = f", {budget.file(shape):,} bytes of {budget.file.type}" if budget.file else ""
    return f"{space.num_params(shape):,} parameters{file}; hidden {hidden}, ffn {ffn}, {heads} heads, {kv} kv heads"


def _phase(steps: int, config: RunConfig) -> str:
    return f"{steps:,} steps, {format_count(steps * config.batch_tokens)} tokens"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
