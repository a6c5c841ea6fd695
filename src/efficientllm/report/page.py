"""`efficientllm report`: one page that shows a run, or several on the same axes; it needs no network and no script."""

import sys
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from efficientllm import __version__
from efficientllm.errors import ConfigError
from efficientllm.files import write_whole
from efficientllm.numbers import format_count
from efficientllm.report import facts
from efficientllm.report.facts import name_of
from efficientllm.report.figures import figures_of
from efficientllm.report.history import History, read_run
from efficientllm.report.multi_run import shared_figures
from efficientllm.report.samples import MOST_PARAMS, Texts, make_texts, stored_texts
from efficientllm.report.values import values_table
from efficientllm.report.verdict import verdict, verdicts

PAGE = "report.html"
MOST_RUNS = len(ascii_uppercase)  # each is called by a letter
FEW_VALUES = 10  # rows of values of each of several runs
MOST_WARNINGS = 5  # that are shown at once


def report(runs: Sequence[str], out: str | None, *, samples: bool, trust_remote_code: bool) -> int:
    """Writes the page of runs and prints where it is; returns the exit code.

    Args:
        out: file to write; by default report.html in the run's folder, for one run.
        samples: also lets source and result write a text, unless the run folder holds one.

    Raises:
        ConfigError: not a run folder, a run that has not started, several runs without `out`, or no writing to `out`.
    """
    if out is None and len(runs) > 1:
        raise ConfigError("--out is missing; name the file to write for several runs, such as --out report.html")
    if len(runs) > MOST_RUNS:
        raise ConfigError(f"{len(runs)} runs given, but one page shows at most {MOST_RUNS}")
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
    content = page.encode()
    try:
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file with --out") from None
    return len(content)


def render(runs: Sequence[History], texts: Sequence[Texts], refresh: int | None = None) -> str:
    """Returns the page of runs as HTML; with `refresh` it reloads every `refresh` seconds."""
    one = len(runs) == 1
    named = [("", runs[0])] if one else list(zip(ascii_uppercase, runs, strict=False))
    labels = ["" if one else f"{letter}: {name_of(run)}" for letter, run in named]
    context = {
        "runs": len(runs),
        **(_one_run(runs[0]) if one else _several_runs(named)),
        "warnings": facts.warnings(named),
        "most_warnings": MOST_WARNINGS,
        "values": [
            (label, values_table(run) if one else values_table(run, FEW_VALUES))
            for label, run in zip(labels, runs, strict=True)
        ],
        "texts": [
            {"name": label, "note": each.note, "samples": each.samples}
            for label, each in zip(labels, texts, strict=True)
        ],
        "next": [(label, facts.next_commands(run, each)) for label, run, each in zip(labels, runs, texts, strict=True)],
        "compare": "" if one else facts.compare_command(named),
        "commands": [(label, facts.command(run)) for label, run in zip(labels, runs, strict=True)],
        "environment": facts.environment(named),
        "files": facts.files(named),
        "settings": facts.settings(named),
        "refresh": refresh,
        "version": __version__,
    }
    return str(_environment().get_template("page.html").render(context))


def waiting_page(run: str, refresh: int) -> str:
    """Returns what a followed run shows before its first step."""
    return str(_environment().get_template("waiting.html").render(title=run, refresh=refresh))


def _one_run(run: History) -> dict[str, Any]:
    return {
        "title": f"{name_of(run)}: {format_count(run.source_params)} to {format_count(run.params)} parameters",
        "lead": f"{run.config['model']}, trained on {', '.join(run.config['data'])}",
        "verdicts": [verdict(run)],
        "states": facts.states(run),
        "numbers": facts.numbers(run),
        "table": None,
        "figures": figures_of(run),
    }


def _several_runs(named: Sequence[tuple[str, History]]) -> dict[str, Any]:
    return {
        "title": f"{len(named)} runs",
        "lead": "From " + ", ".join(sorted({run.config["model"] for _, run in named})),
        "verdicts": verdicts(named),
        "states": [],
        "numbers": [],
        "table": facts.runs_table(named),
        "figures": shared_figures(named),
    }


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("efficientllm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
