"""`efficientllm compare`: runs side by side, from their folders."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientllm.errors import ConfigError
from efficientllm.files import check_out, put, staging
from efficientllm.numbers import format_count
from efficientllm.report.history import History, read_run
from efficientllm.report.layer_plots import sizes_text

if TYPE_CHECKING:
    from rich.console import Console

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # columns of a curve
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {  # of the table, from a run's figures
    "run": lambda run: run["run"] + ("" if run["finished"] else " *"),
    "params": lambda run: f"{run['params']:,}",
    "hidden·ffn·heads": lambda run: _shape(**run["shape"]),
    "tokens": lambda run: format_count(run["tokens"]),
    "FLOPs": lambda run: "?" if run["flops"] is None else f"{run['flops']:.3g}",
    "time": lambda run: duration(run["seconds"]),
    "source": lambda run: _loss(run["valid_loss"]["source"]),
    "last": lambda run: _loss(run["valid_loss"]["last"]),
    "best": lambda run: _loss(run["valid_loss"]["best"]),
}
NOTES = (
    "source, last, best: loss on the run's own validation data, nats per token. time: training steps only. "
    "FLOPs: what the model needs at the shape of each step. heads: query/key-value."
)


def compare(runs: Sequence[str], *, out: str | None, overwrite: bool) -> int:
    """Prints runs side by side with their curves, and writes them as Markdown or JSON; returns the exit code.

    Raises:
        ConfigError: a folder is not a run, an `out` of another kind, or one that is there or cannot be written.
    """
    file = Path(out).expanduser() if out else None
    if file:
        if file.suffix not in (".md", ".json"):
            raise ConfigError(f"--out {out}: has the extension {file.suffix or '(none)'}; give a .md or a .json file")
        check_out(file, overwrite, folder=False)
    histories = [read_run(run) for run in runs]
    figures = [figures_of(run, history) for run, history in zip(runs, histories, strict=True)]
    if file:
        text = markdown(figures) if file.suffix == ".md" else json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
        with staging(file) as folder:
            (folder / file.name).write_text(text, encoding="utf-8")
            put(folder / file.name, file)
    _print(figures, histories)
    if file:
        print(f"written to {file}")
    return 0


def figures_of(name: str, history: History) -> dict[str, Any]:
    """Returns what is compared of a run, as JSON values; `best` is the best after the source."""
    losses = history.valid_losses
    after = [(loss, tokens) for tokens, loss in losses if tokens > 0]
    last = history.rows[-1]
    words = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "run": name,
        "finished": history.finished,
        "params": history.params,
        "source_params": history.source_params,
        "shape": {word: last[word] for word in words},
        "tokens": history.tokens,
        "planned_tokens": history.config["tokens"],
        "flops": history.flops[-1] if history.flops else None,
        "seconds": round(history.seconds, 1),
        "valid_loss": {
            "source": next((loss for tokens, loss in losses if tokens == 0), None),
            "last": after[-1][0] if after else None,
            "best": min(after)[0] if after else None,
            "best_at_tokens": min(after)[1] if after else None,
        },
        "valid_curve": [[tokens, loss] for tokens, loss in losses],
        "config": history.config,
    }


def markdown(figures: Sequence[dict[str, Any]]) -> str:
    """Returns the table in Markdown, with what its figures mean."""
    rows = [list(COLUMNS), ["---", *("---:" for _ in list(COLUMNS)[1:])], *([*_cells(run)] for run in figures)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return f"{table}\n\n{_notes(figures)}\n"


def spark(values: Sequence[float | None], low: float, high: float) -> str:
    """Returns values as bars between `low` and `high`; a value that is missing is a blank."""
    step = (high - low) / len(BARS) or 1.0
    return "".join(
        " " if value is None else BARS[min(len(BARS) - 1, max(0, int((value - low) / step)))] for value in values
    )


def binned(points: Sequence[tuple[int, float]], end: int, width: int = WIDTH) -> list[float | None]:
    """Returns the means of (tokens, value) over `width` even spans of (0, end]; None where a span holds no point."""
    spans: list[list[float]] = [[] for _ in range(width)]
    for tokens, value in points:
        if 0 < tokens <= end:
            spans[(tokens * width - 1) // end].append(value)
    return [sum(span) / len(span) if span else None for span in spans]


def duration(seconds: float) -> str:
    """Returns seconds as 42s, 3m05s or 2h07m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _print(figures: Sequence[dict[str, Any]], histories: Sequence[History]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        first = column == "run"
        table.add_column(column, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for run in figures:
        table.add_row(*(escape(cell) for cell in _cells(run)))
    console.print(table)
    console.print(_notes(figures), markup=False, soft_wrap=True)
    end = max(history.tokens for history in histories)
    if end:
        _print_curves(console, figures, histories, end)


def _print_curves(
    console: "Console", figures: Sequence[dict[str, Any]], histories: Sequence[History], end: int
) -> None:
    """Prints training loss and parameters over tokens, every run on the same axes."""
    losses = [
        binned([(row["tokens"], row["loss"]) for row in history.rows if row["loss"] is not None], end)
        for history in histories
    ]
    sizes = [binned([(row["tokens"], row["params"]) for row in history.rows], end) for history in histories]
    for title, curves, text in (
        ("training loss", losses, lambda value: f"{value:.2f}"),
        ("parameters", sizes, format_count),
    ):
        values = [value for curve in curves for value in curve if value is not None]
        if not values:
            continue
        low, high = min(values), max(values)
        console.print(
            f"\n{title} over {format_count(end)} tokens, from {text(low)} ({BARS[0]}) to {text(high)} ({BARS[-1]})"
        )
        for run, curve in zip(figures, curves, strict=True):
            console.print(f"{spark(curve, low, high)}  {run['run']}", markup=False, soft_wrap=True)


def _notes(figures: Sequence[dict[str, Any]]) -> str:
    return NOTES + ("" if all(run["finished"] for run in figures) else " *: not finished.")


def _cells(run: dict[str, Any]) -> list[str]:
    return [cell(run) for cell in COLUMNS.values()]


def _shape(**sizes: int | list[int]) -> str:
    """Returns widths, or the range of the layers' where they differ: 62·480-1536·6/3."""
    hidden, ffn, heads, kv = (sizes_text(size) for size in sizes.values())
    return f"{hidden}·{ffn}·{heads}/{kv}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
