"""The figures of several runs on the same axes."""

from collections.abc import Sequence

from efficientllm.numbers import format_count
from efficientllm.report.charts import Line, panel, percent, picked, style_of, thinned
from efficientllm.report.figures import (
    Figure,
    architecture_of,
    kept,
    loss_range,
    machine,
    present,
    size_panel,
)
from efficientllm.report.history import History
from efficientllm.report.timeseries import SIZES, pruned_shares, training_loss


def shared_figures(runs: Sequence[tuple[str, History]]) -> list[Figure]:
    """Returns the figures of several runs, each under its label, on the same axes."""
    return present([_losses(runs), _shares(runs), _anatomies(runs), machine(runs)])


def _losses(runs: Sequence[tuple[str, History]]) -> Figure:
    valid = [Line(label, run.valid_losses, style_of(n), dots=True) for n, (label, run) in enumerate(runs)]
    training = [Line(label, thinned(training_loss(run), 80), style_of(n)) for n, (label, run) in enumerate(runs)]
    panels = [
        panel("Held-out loss", valid, "tokens", format_count),
        panel(
            "Training loss",
            training,
            "tokens",
            format_count,
            y_range=loss_range([line.points for line in training], []),
        ),
    ]
    return Figure(
        "loss",
        "Loss",
        "Loss in nats per token over tokens, each run under its letter. Losses on held-out text compare only between "
        "runs with the same data. Training losses are means of neighbouring steps.",
        panels=kept(panels),
    )


def _shares(runs: Sequence[tuple[str, History]]) -> Figure:
    series = [pruned_shares(run.rows) for _, run in runs]
    panels = [size_panel(runs, None)]
    for name in SIZES:
        lines = [
            Line(label, picked(each[name]), style_of(n))
            for n, ((label, _), each) in enumerate(zip(runs, series, strict=True))
            if name in each
        ]
        if any(share > 0 for line in lines for _, share in line.points):
            title = f"Share removed: {name}"
            panels.append(panel(title, lines, "tokens", format_count, percent, from_zero=True))
    return Figure("selection", "Size, and what was removed", "Over tokens; means over layers.", panels=kept(panels))


def _anatomies(runs: Sequence[tuple[str, History]]) -> Figure:
    pictures = [(f"{label}: widths of the layers", architecture_of(run)) for label, run in runs]
    return Figure(
        "architecture",
        "The architectures before and after",
        "A row is a layer, the first at the bottom; pale is the source, solid what is left. Within a picture all "
        "widths are on one scale; heads are as wide as their number times the head size.",
        architectures=[(title, picture) for title, picture in pictures if picture],
    )
