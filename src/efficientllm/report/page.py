"""`efficientllm report`: one page that shows a run, or several on the same axes; it needs no network and no script."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from efficientllm import __version__
from efficientllm.config.command_line import command_line
from efficientllm.config.run_config import from_dict
from efficientllm.errors import ConfigError
from efficientllm.numbers import format_count
from efficientllm.report.charts import scientific
from efficientllm.report.figures import figures_of
from efficientllm.report.history import History, read_run
from efficientllm.report.multi_run import shared_figures
from efficientllm.report.samples import MOST_PARAMS, Texts, make_texts, stored_texts
from efficientllm.report.timeseries import end_of_pruning, sizes_of

PAGE = "report.html"
MOST_RUNS = len(ascii_uppercase)  # each is called by a letter

Table = list[list[str]]


def report(runs: Sequence[str], out: str | None, *, samples: bool, trust_remote_code: bool) -> int:
    """Writes the page of runs and prints where it is; returns the exit code.

    Args:
        out: file to write; by default report.html in the run's folder, for one run.
        samples: also lets source and result write a text, unless the run folder holds one.

    Raises:
        ConfigError: no run folder, a run that has not begun, several runs without `out`, or `out` cannot be written.
    """
    if out is None and len(runs) > 1:
        raise ConfigError("--out is missing; name the file to write for several runs, such as --out report.html")
    if len(runs) > MOST_RUNS:
        raise ConfigError(f"{len(runs)} runs; one page takes {MOST_RUNS} at most")
    histories = [read_run(run) for run in runs]
    path = Path(out).expanduser() if out else histories[0].folder / PAGE
    if path.is_dir():
        raise ConfigError(f"--out {out} is a folder; name the file to write, such as {path / PAGE}")
    texts = [make_texts(run, trust_remote_code) if samples else stored_texts(run) for run in histories]
    size = write_page(path, render(histories, texts))
    print(f"{path}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {size / 1e3:.0f} kB")
    return 0


def report_finished(folder: str) -> None:
    """Writes the page of a run that has just ended; what goes wrong with it is a warning, for the run is done."""
    try:
        run = read_run(folder)
        small = run.source_params <= MOST_PARAMS
        texts = make_texts(run, run.config["trust_remote_code"]) if small else stored_texts(run)
        path = run.folder / PAGE
        write_page(path, render([run], [texts]))
    except Exception as error:  # whatever it is: the result stands
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"efficientllm: warning: no report: {reason}; try efficientllm report {folder}", file=sys.stderr)
        return
    print(f"report: {path}")


def write_page(path: Path, page: str) -> int:
    """Writes a page, whole or not at all; returns its bytes.

    Raises:
        ConfigError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    content = page.encode()
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file with --out") from None
    return len(content)


def render(runs: Sequence[History], texts: Sequence[Texts], refresh: int | None = None) -> str:
    """Returns the page of runs as HTML; with `refresh` it loads itself anew after so many seconds."""
    content = _one_run(runs[0]) if len(runs) == 1 else _several_runs(runs)
    labels = [""] if len(runs) == 1 else [f"{letter}: {name_of(run)}" for letter, run in lettered(runs)]
    shown = [
        {"name": label, "note": each.note, "samples": each.samples} for label, each in zip(labels, texts, strict=True)
    ]
    commands = [(label, _command(run)) for label, run in zip(labels, runs, strict=True)]
    context = {
        "runs": len(runs),
        "texts": shown,
        "commands": commands,
        "refresh": refresh,
        "version": __version__,
        **content,
    }
    return str(_environment().get_template("page.html").render(context))


def waiting_page(run: str, refresh: int) -> str:
    """Returns what a followed run shows before its first step."""
    return str(_environment().get_template("waiting.html").render(title=run, refresh=refresh))


def lettered(runs: Sequence[History]) -> list[tuple[str, History]]:
    """Returns the runs under their letters."""
    return list(zip(ascii_uppercase, runs, strict=False))


def name_of(run: History) -> str:
    """Returns what a run is called: its folder's name."""
    return run.folder.resolve().name


def duration(seconds: float) -> str:
    """Returns seconds as people write them: 41 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _one_run(run: History) -> dict[str, Any]:
    return {
        "title": f"{name_of(run)}: {format_count(run.source_params)} to {format_count(run.params)} parameters",
        "lead": f"{run.config['model']}, trained on {', '.join(run.config['data'])}",
        "states": _state(run),
        "numbers": _numbers(run),
        "table": None,
        "figures": figures_of(run),
        "warnings": _warnings([("", run)]),
        "settings": [["setting", "value"], *([name, _text(value)] for name, value in run.config.items())],
    }


def _several_runs(runs: Sequence[History]) -> dict[str, Any]:
    named = lettered(runs)
    differing = [name for name in runs[0].config if len({_text(run.config.get(name)) for run in runs}) > 1]
    return {
        "title": f"{len(runs)} runs",
        "lead": "From " + ", ".join(sorted({run.config["model"] for run in runs})),
        "states": [f"{letter}: {state}" for letter, run in named for state in _state(run)],
        "numbers": [],
        "table": [
            ["run", "name", "parameters", "shape", "loss before", "loss after", "best", "tokens", "time", "FLOPs"],
            *(_row(letter, run) for letter, run in named),
        ],
        "figures": shared_figures(named),
        "warnings": _warnings(named),
        "settings": [
            ["setting", *(letter for letter, _ in named)],
            *([name, *(_text(run.config.get(name)) for run in runs)] for name in differing),
        ],
    }


def _state(run: History) -> list[str]:
    if run.finished:
        return []
    total = math.ceil(run.config["tokens"] / run.config["batch_tokens"])
    return [f"Not finished: step {run.rows[-1]['step']:,} of {total:,}, {run.rows[-1]['phase']} phase."]


def _numbers(run: History) -> list[tuple[str, str, str]]:
    """Returns the headline numbers: name, value, and a note under it."""
    less = 1 - run.params / run.source_params
    found = [("Parameters", f"{run.params:,}", f"of {run.source_params:,}: {less:.0%} less")]
    valid = run.valid_losses
    if len(valid) > 1:
        found.append(("Held-out loss", f"{valid[-1][1]:.3f}", f"nats per token; {valid[0][1]:.3f} in the source"))
    pruning = min(end_of_pruning(run), run.tokens)
    found.append(("Tokens", format_count(run.tokens), f"{format_count(pruning)} of them while pruning"))
    if run.seconds:
        speed = format_count(run.tokens / run.seconds)
        found.append(("Training time", duration(run.seconds), f"{speed} tokens a second, validation left out"))
    if run.flops and run.flops[-1]:
        note = ""
        if run.source_flops:
            saved = 1 - run.flops[-1] / run.source_flops
            note = f"{abs(saved):.0%} {'less' if saved >= 0 else 'more'} than the source over as many tokens"
        found.append(("Training FLOPs", scientific(run.flops[-1]), note))
    return found


def _row(letter: str, run: History) -> list[str]:
    valid = [loss for _, loss in run.valid_losses]
    return [
        letter,
        name_of(run),
        f"{run.params:,}",
        sizes_of(run.rows[-1]),
        f"{valid[0]:.3f}" if valid else "–",
        f"{valid[-1]:.3f}" if len(valid) > 1 else "–",
        f"{min(valid[1:]):.3f}" if len(valid) > 1 else "–",
        format_count(run.tokens),
        duration(run.seconds),
        scientific(run.flops[-1]) if run.flops else "–",
    ]


def _warnings(runs: Sequence[tuple[str, History]]) -> Table:
    rows = [
        [f"{letter} {row['step']}".strip(), warning]
        for letter, run in runs
        for row in run.rows
        for warning in row.get("warnings", ())
    ]
    return [["step", "warning"], *rows] if rows else []


def _command(run: History) -> str:
    return command_line(from_dict(run.config, str(run.folder)))


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("efficientllm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
