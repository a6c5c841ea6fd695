"""The part of `efficientllm plan` about GPUs: hours, what bounds a step, memory of each, and what would make it fit."""

import math
from typing import TYPE_CHECKING

from efficientllm.config.run_config import RunConfig
from efficientllm.numbers import format_count
from efficientllm.planning.cluster_costs import Setup, make_setup, phase_seconds, step_cost
from efficientllm.planning.gpus import Cluster
from efficientllm.planning.run_plan import RunPlan
from efficientllm.planning.suggestions import Suggestion, suggest
from efficientllm.space.dims import Space
from efficientllm.training.memory_estimate import MEMORY_SHARE, PRECISIONS, frozen_bytes

if TYPE_CHECKING:
    from rich.table import Table

BRIEF = 0.01  # seconds; the calls of a step of a few layers take a CPU as long


def cluster_parts(plan: RunPlan, config: RunConfig, cluster: Cluster, space: Space) -> list["str | Table"]:
    """Returns what a plan costs on a cluster, as lines and tables.

    Raises:
        ConfigError: as `make_setup`.
    """
    setup = make_setup(config, cluster, space, plan.source, teacher=plan.teacher)
    limit = MEMORY_SHARE * cluster.gpu.memory
    return [
        f"Estimate for {cluster.num_gpus} × {cluster.gpu.name} ({gpu_words(cluster)})",
        *hours_lines(plan, config, cluster, setup, space),
        step_table(plan, config, cluster, setup, space),
        f"Memory per GPU in GB, at the source's shape; up to {gigabytes(limit)} ({MEMORY_SHARE:.0%} of a GPU) fits",
        memory_table(plan, config, cluster, space),
        *legend_lines(config, cluster),
        *suggestion_lines(suggest(config, cluster, space, plan.source, plan.teacher), setup, plan, space),
    ]


def gpu_words(cluster: Cluster) -> str:
    """Returns what the estimate takes a GPU and its links for."""
    gpu = cluster.gpu
    flops = f"{format_count(gpu.float32_flops)} float32" if math.isnan(gpu.flops) else f"{format_count(gpu.flops)} bf16"
    words = [f"{flops} FLOP/s", f"{gigabytes(gpu.memory)} GB"]
    if cluster.num_gpus > 1:
        words.append(f"sends {gigabytes(gpu.bandwidth)} GB/s")
    if cluster.bandwidth(cluster.num_gpus) < gpu.bandwidth:
        words[-1] += f", {gigabytes(cluster.bandwidth(cluster.num_gpus))} between machines of {cluster.machine}"
    return ", ".join(words)


def hours_lines(plan: RunPlan, config: RunConfig, cluster: Cluster, setup: Setup, space: Space) -> list[str]:
    """Returns the engine and why it is that, and the hours of both phases."""
    states = gigabytes(16 * space.num_params(plan.source) + frozen_bytes(plan.teacher, PRECISIONS[setup.precision]))
    what = "states and a teacher" if plan.teacher else "states"
    if setup.engine == "one":
        why = "one GPU"
    elif config.engine or config.shards:
        why = "as given"
    else:
        half = "more than half of a GPU" if setup.engine == "fsdp" else "at most half of a GPU"
        why = f"{what} of {states} GB, {half}"
    engine = f"fsdp over {setup.shards}" if setup.engine == "fsdp" else setup.engine
    phases = {
        name: phase_seconds(config, cluster, setup, space, shapes) / 3600
        for name, shapes in (("pruning", plan.pruning), ("afterwards", plan.training))
    }
    phases["total"] = sum(phases.values())
    hours_of = [
        f"{name:<10} {figure(hours)} hours, {figure(hours * cluster.num_gpus)} GPU-hours"
        for name, hours in phases.items()
    ]
    brief = min(step_cost(config, cluster, setup, space, shape).seconds for shape, _ in plan.training) < BRIEF
    if not setup.fits:
        hours_of[-1] += ", if it fitted"
    return [
        f"engine     {engine} in {setup.precision} ({why})",
        *hours_of,
        f"           assumes {cluster.mfu:g} of the FLOP/s (--mfu), and sending that overlaps compute",
        *(
            ["           steps are too short for that: they take as long as a CPU takes to launch them"]
            if brief
            else []
        ),
    ]


def step_table(plan: RunPlan, config: RunConfig, cluster: Cluster, setup: Setup, space: Space) -> "Table":
    """Returns seconds of compute and communication of an optimizer step, and which bounds it, at source and end."""
    traffic = ("sent per GPU", "sending", "bound by") if cluster.num_gpus > 1 else ()
    table = _table("step at", "compute", *traffic, "tokens/s")
    for name, shape in (("source", plan.source), ("end", plan.training[0][0])):
        step = step_cost(config, cluster, setup, space, shape)
        bound = "compute" if step.compute >= step.sending else "sending"
        table.add_row(
            name,
            f"{figure(step.compute)} s",
            *((f"{gigabytes(step.sent)} GB", f"{figure(step.sending)} s", bound) if traffic else ()),
            format_count(config.batch_tokens / step.seconds),
        )
    return table


def memory_table(plan: RunPlan, config: RunConfig, cluster: Cluster, space: Space) -> "Table":
    """Returns the memory of a GPU, in GB, and the hours of the run, for each engine and precision."""
    table = _table("engine", "rows", "states", "copies", "activations", "logits", "peak", "fits", "hours")
    for engine in ("ddp", "fsdp") if cluster.num_gpus > 1 else ("one",):
        for precision in cluster.gpu.precisions:
            setup = make_setup(
                config, cluster, space, plan.source, engine=engine, precision=precision, teacher=plan.teacher
            )
            memory = setup.memory
            copies = memory.peak - memory.states - memory.activations - memory.logits
            hours = phase_seconds(config, cluster, setup, space, [*plan.pruning, *plan.training]) / 3600
            sizes = (memory.states, max(copies, 0), memory.activations, memory.logits, memory.peak)
            table.add_row(
                f"{engine} {precision}",
                f"{setup.micro_batch_size}",
                *(gigabytes(size) for size in sizes),
                "yes" if setup.fits else "no",
                "?" if math.isnan(hours) else figure(hours),
            )
    return table


def legend_lines(config: RunConfig, cluster: Cluster) -> list[str]:
    """Returns what the columns of the memory table mean."""
    copies = ["weights in bf16"] if "bf16" in cluster.gpu.precisions else []
    if cluster.num_gpus > 1:
        copies += ["ddp's gradient sums", "what fsdp gathers"]
    if config.distill:
        copies.append("the teacher")
    if config.saliency == "taylor2":
        copies.append("squared gradients")
    if config.compensate:
        copies.append("layer inputs")
    return [
        "rows: per pass; states: weights, gradients, moments; activations: saved by it;",
        f"copies: {', '.join(copies) or 'none'}",
    ]


def suggestion_lines(suggestions: list[Suggestion], setup: Setup, plan: RunPlan, space: Space) -> list[str]:
    """Returns what to change if the run does not fit, each line a way that does by the estimate, fastest first."""
    asked = f"{setup.engine} in {setup.precision}"
    if not suggestions:
        return [f"{asked} fits"]
    flags = [" ".join(each.flags) or "as given" for each in suggestions]
    width = max(len(each) for each in flags)
    phases = [*plan.pruning, *plan.training]
    hours_of = [phase_seconds(each.config, each.cluster, each.setup, space, phases) / 3600 for each in suggestions]
    ways = [
        f"  {text:<{width}}  {gigabytes(each.setup.memory.peak):>5} GB, {figure(hours):>5} hours"
        for text, each, hours in zip(flags, suggestions, hours_of, strict=True)
    ]
    if suggestions[0].setup.fits:
        return [f"{asked} does not fit; it would with{' any of these' if len(ways) > 1 else ''}:", *ways]
    return [f"{asked} does not fit, nor does any change that was tried; the smallest is:", *ways]


def gigabytes(size: float) -> str:
    """Returns bytes as a number of GB in three digits."""
    return figure(size / 1e9)


def figure(value: float) -> str:
    """Returns a number in three digits, and at most three after the point: <0.001, 0.012, 1.23, 123, 1,234."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 0.1 or value == 0:
        return f"{value:.3g}"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def _table(*names: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    return table
