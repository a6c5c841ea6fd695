"""The figures of a run, each with a caption that says what is seen; and those that runs beside each other share."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import floor, log10
from typing import TypeVar

from efficientllm.numbers import format_count
from efficientllm.report import formats
from efficientllm.report.charts import Axis, Line, Panel, Point, bulk, panel, picked, style_of, thinned
from efficientllm.report.history import History
from efficientllm.report.layer_plots import (
    LABELS,
    STYLES,
    Architecture,
    HeatMap,
    UnitMap,
    architecture,
    heat_map,
    taken,
    unit_maps,
)
from efficientllm.report.ticks import ticks
from efficientllm.report.timeseries import (
    SIZES,
    elapsed,
    end_of_pruning,
    gone_layers,
    logged,
    lowest_saliencies,
    model_config,
    num_layers,
    pruned_shares,
    tokens_at,
    training_loss,
    validations,
)

TOKENS = Axis("tokens", format_count, formats.whole)
PARAMS = Axis("parameters", format_count, formats.whole)
LOSS = Axis("nats per token", None, formats.loss)
SALIENCY = Axis("", formats.power, formats.scientific)
SHARE = Axis("", formats.percent, formats.percent1)
NORM = Axis("", None, formats.short)
SPEED = Axis("", format_count, formats.whole)
MEMORY = Axis("", formats.byte_size, formats.byte_size)
T = TypeVar("T")

FEW = 10  # rows of a table beside charts


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
    found = [_loss_and_size(run), _selection(run), _anatomy(run), _units(run), _steps(run), _machine(run)]
    return present(found)


def _loss_and_size(run: History) -> Figure:
    loss, valid = training_loss(run), validations(run)
    means, by_size = thinned(loss), thinned(training_loss(run, "params"))
    held_out: list[Point] = [(each.tokens, each.loss) for each in valid]
    rule = (end_of_pruning(run), "pruning ends") if run.rows[-1]["phase"] == "train" else None
    dots = len(valid) <= 40
    lines = [Line("training", means, "quiet"), Line("held out", held_out, dots=dots)]
    shrinking = [Line("training", by_size, "quiet"), Line("held out", [(v.params, v.loss) for v in valid], dots=dots)]
    caption = (
        "Loss over tokens, and over the parameters of the model at the time: that axis falls, so that a line goes "
    )
    caption += "on as the model shrinks, and straight up or down while its size stays. "
    y_range = loss_range([means], [held_out])
    if y_range and any(y > y_range[1] for _, y in means):
        caption += "The highest training losses lie outside the picture. "
    if len(means) < len(loss):
        caption += f"Training loss: means of {-(-len(loss) // len(means))} steps. "
    if any("ce" in row for row in run.rows):
        caption += "Training loss: its part on the text alone, without the teacher's. "
    panels = [
        panel("Loss", lines, TOKENS, LOSS, y_range=y_range, rule=rule),
        panel("Loss by size", shrinking, PARAMS, LOSS, y_range=y_range, falling=True),
        size_panel([(format_count(run.params), run)], rule),
    ]
    rows = [
        [formats.whole(v.tokens), formats.whole(v.params), formats.loss(v.loss), formats.perplexity(v.loss)]
        for v in picked(valid, FEW - 1)
    ]
    return Figure(
        "loss",
        "Loss and size",
        caption,
        panels=kept(panels),
        table_title="Held-out text",
        table=[["tokens", "parameters", "loss", "perplexity"], *rows] if rows else [],
    )


def _selection(run: History) -> Figure:
    saliencies = lowest_saliencies(run.removals)
    lines = [
        Line(LABELS.get(kind, kind), thinned(saliencies[kind]), STYLES.get(LABELS.get(kind, kind), "quiet"))
        for kind in (*LABELS, *(saliencies.keys() - LABELS.keys()))
        if kind in saliencies
    ]
    end = run.removals[-1]["tokens"] if run.removals else 0
    until = [row for row in run.rows if row["tokens"] <= end]
    shares = pruned_shares(until) if until else {}
    shared = [Line(label, picked(points), STYLES[label]) for label, points in shares.items()]
    panels = [
        panel("Lowest saliency of each kind", lines, TOKENS, SALIENCY, log=True),
        panel("Share removed of each kind", shared, TOKENS, SHARE, from_zero=True),
    ]
    return Figure(
        "selection",
        "What was removed, and why",
        "Up to the last removal. Lowest saliency: that of the least salient group of every kind, on a logarithmic "
        "axis; the lowest goes next (the paper's figure A0). Share removed: how much of each kind was gone by then, as "
        "a mean over layers.",
        panels=kept(panels) if run.removals else (),
    )


def _anatomy(run: History) -> Figure:
    picture = architecture_of(run)
    rows = [[name, f"{number:,}", formats.percent(share)] for name, number, share in taken(run.removals)]
    layers = num_layers(run)
    differ = any(isinstance(run.rows[-1][name], list) for name in SIZES.values())
    heats = [
        heat_map(f"Share of {label} that went, by layer", run.rows, name, layers, STYLES[label])
        for label, name in SIZES.items()
        if differ
    ]
    caption = "A row is a layer, the first at the bottom; pale is the source, solid the result. "
    caption += "All widths are on one scale; heads are as wide as their number times the head size."
    if heats:
        caption += " By layer, over tokens: the darker, the more of a layer was gone, in fifths; its share at the end "
        caption += "beside it. All layers have one hidden size."
    return Figure(
        "architecture",
        "The architecture before and after",
        caption,
        heats=heats,
        architectures=[("Widths of the layers", picture)] if picture else (),
        table_title="What the removed parameters were",
        table=[["kind", "parameters", "share"], *rows] if run.removals else [],
    )


def _units(run: History) -> Figure:
    maps = unit_maps(run.removals, run.rows[0], num_layers(run))
    shared = max((each.in_cell for each in maps), default=1)
    cells = f"one unit, or up to {shared} neighbours and the share of them that went" if shared > 1 else "one unit"
    return Figure(
        "units",
        "Which units went when",
        f"Units in the source's order, a strip for every layer, the first at the bottom. A cell is {cells}; what "
        "remains is empty.",
        maps=maps,
    )


def _steps(run: History) -> Figure:
    """The learning rate and the gradient's norm of every step; with a teacher its distance too."""
    norms, distances = logged(run, "grad_norm"), logged(run, "kl")
    panels = [
        rate_panel([Line("", picked(logged(run, "lr")))]),
        _measured("Gradient norm", norms, NORM),
        _measured("Distance to the teacher", distances, LOSS),
    ]
    steps = max(-(-len(each) // max(1, len(thinned(each)))) for each in (norms, distances))
    return Figure(
        "steps",
        "Learning rate and gradients",
        "The gradient's norm is the one before it is clipped."
        + (f" Means of {steps} steps; the highest may lie outside the picture." if steps > 1 else "")
        + (" Distance to the teacher: the Kullback-Leibler divergence of its distribution." if distances else ""),
        panels=kept(panels),
    )


def rate_panel(lines: Sequence[Line]) -> Panel | None:
    """Returns the chart of learning rates, in powers of ten that keep its marks short."""
    most = max((rate for line in lines for _, rate in line.points), default=0.0)
    size = 10.0 ** min(floor(log10(most)), 0) if most > 0 else 1.0
    axis = Axis("" if size == 1 else f"× {formats.power(size)}", None, lambda value: formats.short(value * size))
    scaled = [replace(line, points=[(x, y / size) for x, y in line.points]) for line in lines]
    return panel("Learning rate", scaled, TOKENS, axis, from_zero=True)


def _measured(title: str, points: Sequence[Point], axis: Axis) -> Panel | None:
    means = thinned(points)
    return panel(title, [Line("", means)], TOKENS, axis, y_range=loss_range([means], []), from_zero=True)


def _machine(run: History) -> Figure:
    """Throughput and memory over tokens, with the time of training as a second axis."""
    times = elapsed(run.rows)
    unit, size = ("h", 3600) if times[-1] > 7200 else ("min", 60) if times[-1] > 120 else ("s", 1)
    marks = [mark for mark in ticks(0.0, times[-1] / size, 4) if mark * size <= times[-1]] if times[-1] else []
    second = [(tokens_at(run.rows, times, mark * size), f"{formats.plain(mark)} {unit}") for mark in marks]
    panels = [
        panel(title, [Line("", thinned(logged(run, name)))], TOKENS, axis, from_zero=True, second=second)
        for title, name, axis in MACHINE
    ]
    return Figure(
        "machine",
        "Speed and memory",
        f"Over tokens, and on top over the time of training, without validation and checkpoints. {MEMORY_NOTE}",
        panels=kept(panels),
    )


MACHINE = (("Tokens a second", "tokens_per_second", SPEED), ("Memory in use", "memory_bytes", MEMORY))
MEMORY_NOTE = "Memory is that of the first process: the peak between two readings on a GPU, what it holds on a CPU."


def machines(runs: Sequence[tuple[str, History]]) -> Figure:
    """Throughput and memory of several runs over tokens."""
    panels = []
    for title, name, axis in MACHINE:
        lines = [Line(label, thinned(logged(run, name)), style_of(n)) for n, (label, run) in enumerate(runs)]
        panels.append(panel(title, lines, TOKENS, axis, from_zero=True))
    return Figure("machine", "Speed and memory", f"Over tokens. {MEMORY_NOTE}", panels=kept(panels))


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
    return panel("Parameters", lines, TOKENS, Axis("", format_count, formats.whole), from_zero=True, rule=rule)


def loss_range(training: Sequence[Sequence[Point]], valid: Sequence[Sequence[Point]]) -> tuple[float, float] | None:
    """Returns a range that holds every validation loss and all but the highest hundredth of the training losses."""
    values = [y for points in training for _, y in points]
    if not values:
        return None
    low, high = bulk(values)
    held_out = [y for points in valid for _, y in points]
    return min(low, *held_out, high), max(high, *held_out, low)


def kept(found: Sequence[T | None]) -> list[T]:
    """Returns what has data."""
    return [each for each in found if each]


def present(figures: Sequence[Figure]) -> list[Figure]:
    """Returns the figures that have data."""
    return [each for each in figures if each.panels or each.architectures or each.maps]
