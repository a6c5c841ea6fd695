"""The figures of a run, each with a caption that says what is seen; and those that runs beside each other share."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from efficientllm.numbers import format_count
from efficientllm.report.charts import (
    Line,
    Panel,
    Point,
    bulk,
    megabytes,
    panel,
    percent,
    picked,
    plain,
    power,
    style_of,
    thinned,
)
from efficientllm.report.history import History
from efficientllm.report.layer_plots import (
    Architecture,
    HeatMap,
    UnitMap,
    architecture,
    heat_map,
    taken,
    unit_maps,
)
from efficientllm.report.timeseries import (
    SIZES,
    elapsed,
    end_of_pruning,
    gone_layers,
    lowest_saliencies,
    model_config,
    num_layers,
    pruned_shares,
    training_loss,
)

LAYERED = ("FFN", "heads", "KV heads")  # sizes that layers may have of their own
KIND_LABELS = {"hidden": "hidden", "ffn": "FFN", "kv": "KV heads", "query": "heads"}
STYLE = {"hidden": "accent", "FFN": "ink", "heads": "dashed", "KV heads": "dotted"}


@dataclass(frozen=True)
class Figure:
    """One numbered figure: charts, pictures of architectures, maps of units, a table; whichever it has."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel] = ()
    architectures: Sequence[tuple[str, Architecture]] = ()
    maps: Sequence[UnitMap] = ()
    heats: Sequence[HeatMap] = ()
    table_title: str = ""
    table: list[list[str]] = field(default_factory=list)


def figures_of(run: History) -> list[Figure]:
    """Returns the figures of one run, those without data left out."""
    return present([_loss_and_size(run), _selection(run), _anatomy(run), _units(run), machine([("", run)])])


def _loss_and_size(run: History) -> Figure:
    loss, valid = training_loss(run), run.valid_losses
    means = thinned(loss)
    rule = (end_of_pruning(run), "pruning ends") if run.rows[-1]["phase"] == "train" else None
    lines = [Line("training", means, "quiet"), Line("held out", valid, "accent", dots=len(valid) <= 40)]
    caption = "Loss in nats per token, and size, over tokens. "
    if valid:
        worst = max(valid, key=lambda point: point[1])
        caption += f"Held-out text: {valid[0][1]:.3f} in the source, {valid[-1][1]:.3f} at the end"
        caption += f", {worst[1]:.3f} at the most (after {format_count(worst[0])} tokens). " if worst[0] else ". "
    y_range = loss_range([means], [valid])
    if y_range and any(y > y_range[1] for _, y in means):
        caption += "The highest training losses lie above the picture. "
    if len(means) < len(loss):
        caption += f"Training loss: means of {-(-len(loss) // len(means))} steps. "
    panels = [
        panel("Loss", lines, "tokens", format_count, y_range=y_range, rule=rule),
        size_panel([(format_count(run.params), run)], rule),
    ]
    if any("ce" in row for row in run.rows):
        caption += "Training loss: its part on the text alone, without the teacher's. "
    return Figure("loss", "Loss and size", caption, panels=kept(panels))


def _selection(run: History) -> Figure:
    saliencies = lowest_saliencies(run.removals)
    lines = [
        Line(KIND_LABELS.get(kind, kind), thinned(points), STYLE.get(KIND_LABELS.get(kind, kind), "quiet"))
        for kind, points in saliencies.items()
    ]
    end = run.removals[-1]["tokens"] if run.removals else 0
    until = [row for row in run.rows if row["tokens"] <= end]
    shares = pruned_shares(until) if until else {}
    shared = [Line(label, picked(points), STYLE[label]) for label, points in shares.items()]
    panels = [
        panel("Lowest saliency of each kind", lines, "tokens", format_count, power, log=True),
        panel("Share removed of each kind", shared, "tokens", format_count, percent, from_zero=True),
    ]
    return Figure(
        "selection",
        "What was removed, and why",
        "Up to the last removal. Left: the saliency of the least salient group of every kind, on a logarithmic axis; "
        "the lowest goes next (the paper's figure A0). Right: how much of each kind was gone by then.",
        panels=kept(panels) if run.removals else (),
    )


def _anatomy(run: History) -> Figure:
    picture = architecture_of(run)
    where = taken(run.removals)
    rows = [["kind", "parameters", "share"], *([name, f"{n:,}", percent(share)] for name, n, share in where)]
    layers = num_layers(run)
    heats = [heat_map(f"Share of the {label} that went, by layer", run.rows, SIZES[label], layers) for label in LAYERED]
    caption = (
        "A row is a layer, the first at the bottom; pale is the source, solid what is left. All widths are on one "
        "scale; heads are as wide as their number times the head size."
    )
    if any(heats):
        caption += (
            " Below, over tokens: the darker, the more of a layer was gone, in fifths; its share at the end beside it."
        )
    return Figure(
        "architecture",
        "The architecture before and after",
        caption,
        heats=[each for each in heats if each],
        architectures=[("Widths of the layers", picture)] if picture else (),
        table_title="Where the parameters came from",
        table=rows if where else [],
    )


def _units(run: History) -> Figure:
    maps = unit_maps(run.removals, run.rows[0], num_layers(run))
    shared = max((each.in_cell for each in maps), default=1)
    cells = f"one unit, or up to {shared} neighbours and the share of them that went" if shared > 1 else "one unit"
    return Figure(
        "units",
        "Which units went when",
        f"Units in the source's order, a strip for every layer, the first at the bottom. A cell is {cells}; what is "
        "left stays empty.",
        maps=maps,
    )


def machine(runs: Sequence[tuple[str, History]]) -> Figure:
    """Throughput and memory over hours, minutes or seconds of training."""
    times = [elapsed(run.rows) for _, run in runs]
    longest = max(each[-1] for each in times)
    unit, size = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    panels = []
    for title, name, show in (
        ("Tokens a second", "tokens_per_second", format_count),
        ("Memory in use", "memory_bytes", megabytes),
    ):
        lines = [
            Line(
                label,
                thinned([(t / size, row[name]) for t, row in zip(time, run.rows, strict=True) if row.get(name)]),
                style_of(n),
            )
            for n, ((label, run), time) in enumerate(zip(runs, times, strict=True))
        ]
        panels.append(panel(title, lines, unit, plain, show, from_zero=True))
    return Figure(
        "machine",
        "Speed and memory",
        f"Over {unit} of training; validation and checkpoints are left out. Memory is that of the first process: the "
        "peak between two looks on a GPU, what it holds on a CPU.",
        panels=kept(panels),
    )


def architecture_of(run: History) -> Architecture | None:
    """Returns the picture of a run's shapes; None where no config.json says the head size."""
    config = model_config(run)
    first, heads = run.rows[0], config.get("num_attention_heads")
    head_dim = config.get("head_dim") or (config["hidden_size"] // heads if heads else None)
    return architecture(first, run.rows[-1], num_layers(run), head_dim, gone_layers(run)) if head_dim else None


def size_panel(runs: Sequence[tuple[str, History]], rule: tuple[float, str] | None) -> Panel | None:
    """Returns the chart of parameters over tokens."""
    lines = [
        Line(label, picked([(row["tokens"], row["params"]) for row in run.rows]), style_of(n))
        for n, (label, run) in enumerate(runs)
    ]
    return panel("Parameters", lines, "tokens", format_count, format_count, from_zero=True, rule=rule)


def loss_range(training: Sequence[Sequence[Point]], valid: Sequence[Sequence[Point]]) -> tuple[float, float] | None:
    """Returns a range that holds every validation loss and all but the highest hundredth of the training losses."""
    values = [y for points in training for _, y in points]
    if not values:
        return None
    low, high = bulk(values)
    held_out = [y for points in valid for _, y in points]
    return min(low, *held_out, high), max(high, *held_out, low)


def kept(panels: Sequence[Panel | None]) -> list[Panel]:
    """Returns the panels that have data."""
    return [each for each in panels if each]


def present(figures: Sequence[Figure]) -> list[Figure]:
    """Returns the figures that have data."""
    return [each for each in figures if each.panels or each.architectures or each.maps]
