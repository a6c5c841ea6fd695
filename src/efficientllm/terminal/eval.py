"""`efficientllm eval`: scores of models side by side, with the paper's under them, and results.json."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientllm.data.documents import DataSource, parse_source, read_documents
from efficientllm.errors import ConfigError
from efficientllm.evaluation.evaluate import Evaluation, evaluate_model
from efficientllm.evaluation.paper_results import CLASSES, same_size
from efficientllm.evaluation.record import circumstances
from efficientllm.evaluation.tasks import TASKS, Task
from efficientllm.files import check_out, put, staging
from efficientllm.models.load import find_model, finished_model, load_config
from efficientllm.numbers import format_count

if TYPE_CHECKING:
    from rich.console import Console

TITLES = {
    "arc_challenge": "ARC-c",
    "arc_easy": "ARC-e",
    "boolq": "BoolQ",
    "hellaswag": "HellaS",
    "openbookqa": "OBQA",
    "piqa": "PIQA",
    "winogrande": "WinoG",
    "mmlu": "MMLU",
}


def eval_command(
    models: Sequence[str],
    tasks: Sequence[Task],
    texts: Sequence[str],
    *,
    data_dir: str | None,
    limit: int | None,
    batch_size: int,
    out: str | None,
    overwrite: bool,
    reading: Mapping[str, str],
    trust_remote_code: bool,
    arguments: Sequence[str],
) -> int:
    """Scores models, prints the table and writes results.json; returns the exit code.

    Args:
        reading: `text_field` and `txt_split` of the texts.
        arguments: the command line, for results.json.

    Raises:
        EfficientLLMError: no harness, model, data or text, an `out` that is there or cannot be written, no memory left.
    """
    file = Path(out).expanduser() if out else None
    if file:
        check_out(file, overwrite, folder=False)
    paths = [finished_model(model, "eval") for model in models]
    twice = {model for model in models if list(models).count(model) > 1}
    if twice:
        raise ConfigError(f"eval {min(twice)}: named twice; name each model once")
    for path in paths:
        load_config(path, trust_remote_code)
    sources = [_text_source(text, reading) for text in texts]
    loaded = _load(tasks, data_dir)
    for path in paths:
        find_model(path, weights=True)  # a hub's models are there before the first is scored
    with staging(file) if file else nullcontext() as folder:  # it can be written, or nothing begins
        found = [
            evaluate_model(
                model,
                path,
                loaded,
                sources,
                limit=limit,
                batch_size=batch_size,
                reading=reading,
                trust_remote_code=trust_remote_code,
            )
            for model, path in zip(models, paths, strict=True)
        ]
        print_scores(found, limit)
        if file and folder:
            settings = {"limit": limit, "batch_size": batch_size, "num_fewshot": 0, "data": data_dir or "hub"}
            results = {
                **circumstances(arguments),
                "settings": settings,
                "models": [each.as_json() for each in found],
            }
            partial = folder / file.name
            with partial.open("w", encoding="utf-8") as opened:
                json.dump(results, opened, indent=2, ensure_ascii=False)
                opened.write("\n")
                opened.flush()
                os.fsync(opened.fileno())
            put(partial, file)
            print(f"{file}: everything, with errors, versions and hardware")
    return 0


def print_scores(found: Sequence[Evaluation], limit: int | None) -> None:
    """Prints the tables and what has to be known about them."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if found[0].texts:
        _print_texts(console, found)
    if found[0].tasks:
        _print_tasks(console, found, limit)


def _text_source(text: str, reading: Mapping[str, str]) -> DataSource:
    source = parse_source(text)
    if source.weight != 1.0:
        raise ConfigError(f"--text {text}: has a weight, but each text is scored by itself; remove the weight")
    next(read_documents(source, **reading))  # raises if it cannot be read
    return source


def _load(tasks: Sequence[Task], data_dir: str | None) -> list[Any]:
    if not tasks:
        return []
    folder = Path(data_dir).expanduser() if data_dir is not None else None
    if folder and not folder.is_dir():
        raise ConfigError(f"--data-dir {data_dir}: no such folder; it should hold files such as {tasks[0].file}")
    missing = [name for name in ("lm_eval", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--tasks: {' and '.join(missing)} not installed; run pip install 'efficientllm[eval]'")
    from efficientllm.evaluation.harness import load_tasks

    where = data_dir if folder else "the hub"
    print(f"reading {', '.join(task.name for task in tasks)} from {where}", file=sys.stderr)
    return load_tasks(tasks, folder)


def _print_tasks(console: "Console", found: Sequence[Evaluation], limit: int | None) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    names = list(found[0].tasks)
    averaged = found[0].average is not None
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("% correct", overflow="fold")
    for name in ("params", *(TITLES[name] for name in names), *(["mean of 7"] if averaged else [])):
        table.add_column(name, justify="right")
    for each in found:
        metrics = [each.tasks[name].metrics[TASKS[name].metric] for name in names]
        cells = [_percent(*pair) for pair in [*metrics, *([each.average] if each.average else [])]]
        table.add_row(escape(each.model), format_count(each.num_params), *cells)
    quoted = same_size(each.num_params for each in found) if averaged else []
    if quoted:
        table.add_section()
    for row in quoted:
        table.add_row(f"quoted: {row.model}", "", *("" for _ in names), f"{row.average:.2f}")
    console.print(table)
    normalised = [TITLES[name] for name in names if TASKS[name].metric == "acc_norm"]
    items = {name: found[0].tasks[name].num_items for name in names}
    notes = [
        "zero-shot, ± one standard error; acc" + (f", in {', '.join(normalised)} acc_norm" if normalised else ""),
        "items: " + ", ".join(f"{TITLES[name]} {number:,}" for name, number in items.items()),
    ]
    if limit is not None and any(found[0].tasks[name].num_items < found[0].tasks[name].num_all for name in names):
        notes.append(f"--limit {limit}: only the first items; compare these scores only with scores on the same items")
    for each in found:
        if cut := [f"{TITLES[name]} {score.truncated:,}" for name, score in each.tasks.items() if score.truncated]:
            notes.append(f"{each.model}: prompts truncated on the left to fit its context: {', '.join(cut)}")
    if quoted:
        notes.append("quoted: from the paper (arXiv 2502.06663, table 2), its own evaluation, not run here")
    elif averaged:
        sizes = ", ".join(format_count(size) for size in CLASSES)
        notes.append(f"the paper's models have about {sizes} parameters; none is near the size of these")
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def _print_texts(console: "Console", found: Sequence[Evaluation]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    for name, text in found[0].texts.items():
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
        table.add_column("model", overflow="fold")
        for column in ("params", "tokens", "perplexity", "bits per byte"):
            table.add_column(column, justify="right")
        for each in found:
            own = each.texts[name]
            table.add_row(
                escape(each.model),
                format_count(each.num_params),
                f"{sum(own.num_tokens):,}",
                _with_error(*own.perplexity),
                _with_error(*own.bits_per_byte),
            )
        console.print(table)
        console.print(
            f"{name}: {len(text.nats):,} documents, {sum(text.num_bytes):,} bytes", markup=False, soft_wrap=True
        )
    console.print(
        "compare perplexity, which is per token, only within one tokenizer; bits per byte across tokenizers\n",
        soft_wrap=True,
    )


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" + (f"\n±{100 * error:.1f}" if error is not None else "")


def _with_error(value: float, error: float | None) -> str:
    digits = 4 if value < 10 else 2
    return f"{value:,.{digits}f}" + (f" ± {error:,.{digits}f}" if error is not None else "")
