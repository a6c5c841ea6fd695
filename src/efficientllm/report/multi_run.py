"""The figures of several runs on the same axes."""

from collections.abc import Sequence

from efficientllm.report.charts import Line, panel, picked, style_of, thinned
from efficientllm.report.figures import (
    LOSS,
    NORM,
    PARAMS,
    SHARE,
    TOKENS,
    Figure,
    architecture_of,
    kept,
    loss_range,
    machines,
    present,
    rate_panel,
    size_panel,
)
from efficientllm.report.history import History
from efficientllm.report.timeseries import SIZES, logged, pruned_shares, training_loss, validations

Named = Sequence[tuple[str, History]]  # runs under their letters
POINTS = 80  # of a training curve: more hide each other


def shared_figures(runs: Named) -> list[Figure]:
    """Returns the figures of several runs, each under its label, on the same axes."""
    return present([_losses(runs), _shares(runs), _anatomies(runs), _steps(runs), machines(runs)])


def _losses(runs: Named) -> Figure:
    looks = [validations(run) for _, run in runs]
    valid = [
        Line(label, [(each.tokens, each.loss) for each in found], style_of(n), dots=len(found) <= 20)
        for n, ((label, _), found) in enumerate(zip(runs, looks, strict=True))
    ]
    by_size = [
        Line(label, [(each.params, each.loss) for each in found], style_of(n), dots=len(found) <= 20)
        for n, ((label, _), found) in enumerate(zip(runs, looks, strict=True))
    ]
    training = [Line(label, thinned(training_loss(run), POINTS), style_of(n)) for n, (label, run) in enumerate(runs)]
    y_range = loss_range([line.points for line in training], [])
    panels = [
        panel("Held-out loss", valid, TOKENS, LOSS),
        panel("Held-out loss by size", by_size, PARAMS, LOSS, falling=True),
        panel("Training loss", training, TOKENS, LOSS, y_range=y_range),
        size_panel(runs, None),
    ]
    return Figure(
        "loss",
        "Loss and size",
        "Each run under its letter, over tokens and over the parameters of the model at the time. Losses on held-out "
        "text compare only between runs with the same source and data. Training losses are means of nearby steps.",
        panels=kept(panels),
    )


def _shares(runs: Named) -> Figure:
    series = [pruned_shares(run.rows) for _, run in runs]
    panels = []
    for name in SIZES:
        lines = [
            Line(label, picked(each[name]), style_of(n))
            for n, ((label, _), each) in enumerate(zip(runs, series, strict=True))
        ]
        panels.append(panel(f"Share removed: {name}", lines, TOKENS, SHARE, from_zero=True))
    caption = "Over tokens; means over layers."
    return Figure("selection", "What was removed", caption, panels=kept(panels))


def _anatomies(runs: Named) -> Figure:
    pictures = [(f"{label}: widths of the layers", architecture_of(run)) for label, run in runs]
    return Figure(
        "architecture",
        "The architectures before and after",
        "A row is a layer, the first at the bottom; pale is the source, solid the result. Within a picture all "
        "widths are on one scale; heads are as wide as their number times the head size.",
        architectures=[(title, picture) for title, picture in pictures if picture],
    )


def _steps(runs: Named) -> Figure:
    rates = [Line(label, picked(logged(run, "lr")), style_of(n)) for n, (label, run) in enumerate(runs)]
    norms = [Line(label, thinned(logged(run, "grad_norm"), POINTS), style_of(n)) for n, (label, run) in enumerate(runs)]
    y_range = loss_range([line.points for line in norms], [])
    panels = [
        rate_panel(rates),
        panel("Gradient norm", norms, TOKENS, NORM, y_range=y_range, from_zero=True),
    ]
    caption = "Over tokens. The gradient's norm is the one before it is clipped, as means of neighbouring steps."
    return Figure("steps", "Learning rate and gradients", caption, panels=kept(panels))
