"""What the page says beside its figures: numbers, warnings, files, machine and versions, commands, settings."""

import math
from collections.abc import Sequence
from pathlib import Path
from shlex import quote, split
from typing import Any

from efficientllm.config.command_line import command_line
from efficientllm.config.run_config import from_dict
from efficientllm.numbers import format_count
from efficientllm.report.formats import byte_size, duration, loss, percent, perplexity, scientific
from efficientllm.report.history import History
from efficientllm.report.samples import Texts
from efficientllm.report.timeseries import end_of_pruning
from efficientllm.report.values import MISSING
from efficientllm.report.verdict import difference, last_loss, source_loss
from efficientllm.run.environment import read_starts

Table = list[list[str]]  # rows, the first of them the heads
Named = Sequence[tuple[str, History]]  # runs under their letters; one run alone has none
NOT_RECORDED = "not recorded"


def states(run: History) -> list[str]:
    """Returns what is special about a run: that it has not come to its end."""
    if run.finished:
        return []
    total = math.ceil(run.config["tokens"] / run.config["batch_tokens"])
    return [f"Not finished: step {run.rows[-1]['step']:,} of {total:,}, {run.rows[-1]['phase']} phase."]


def numbers(run: History) -> list[tuple[str, str, str]]:
    """Returns the headline numbers: name, value, and a note under it."""
    less = 1 - run.params / run.source_params
    found = [("Parameters", f"{run.params:,}", f"of {run.source_params:,}: {less:.0%} less")]
    first, last = source_loss(run), last_loss(run)
    if first is not None and last is not None:
        begun = "with fresh weights" if run.config["method"] == "scratch" else "in the source"
        found.append(("Held-out loss", loss(last), f"nats per token; {loss(first)} {begun}"))
        found.append(("Perplexity", perplexity(last), f"{perplexity(first)} {begun}"))
    if size := weights_size(run.folder / "model"):
        source = weights_size(Path(run.config["model"]).expanduser())
        found.append(
            ("Weights on disk", byte_size(size), f"{byte_size(source)} in the source" if source else "RUN/model")
        )
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
    if starts := read_starts(run.folder):
        machine = starts[0].get("hardware", {})
        found.append(("Begun", str(starts[0].get("date"))[:10], str(machine.get("gpu") or machine.get("processor"))))
    return found


def runs_table(runs: Named) -> Table:
    """Returns several runs side by side."""
    heads = ["run", "parameters", "less", "held-out loss", "against source", "perplexity", "best loss"]
    return [[*heads, "tokens", "time", "FLOPs", "weights"], *(_row(letter, run) for letter, run in runs)]


def warnings(runs: Named) -> list[tuple[str, str]]:
    """Returns every warning of the logs, once, and the steps at which it came."""
    steps: dict[str, list[str]] = {}
    for letter, run in runs:
        for row in run.rows:
            for warning in row.get("warnings", ()):
                steps.setdefault(warning, []).append(f"{letter} {row['step']:,}".strip())
    return [(_few(at), warning) for warning, at in steps.items()]


def files(runs: Named) -> Table:
    """Returns what lies in the folders of runs that takes room, with its size."""
    rows = []
    for letter, run in runs:
        for name in ("model", "models", "checkpoints", "data"):
            if (folder := run.folder / name).is_dir():
                what = f"{letter} {name}/".strip()
                rows.append([what, _contents(folder), byte_size(sum(f.stat().st_size for f in _files(folder)))])
    return [["folder", "holds", "size"], *rows] if rows else []


def environment(runs: Named) -> Table:
    """Returns a column for every start of every run: when, on what, with which versions; empty if none is recorded."""
    if not any(read_starts(run.folder) for _, run in runs):
        return []
    starts: list[tuple[str, dict[str, Any]]] = []
    for letter, run in runs:
        for number, start in enumerate(read_starts(run.folder) or [{}]):
            step = start.get("step", 0)
            what = "begun" if number == 0 and step == 0 else f"resumed at step {step:,}"
            starts.append((f"{letter} {what}".strip(), start))
    names = list(dict.fromkeys(name for _, start in starts for name in start.get("versions", {})))
    rows = [
        [
            "date",
            *(_date(start.get("date", NOT_RECORDED)) for _, start in starts),
        ],
        ["hardware", *(_hardware(start.get("hardware", {})) for _, start in starts)],
        ["system", *(str(start.get("hardware", {}).get("system", NOT_RECORDED)) for _, start in starts)],
        *([name, *(str(start.get("versions", {}).get(name, MISSING)) for _, start in starts)] for name in names),
    ]
    return [["", *(what for what, _ in starts)], *rows]


def next_commands(run: History, texts: Texts) -> list[tuple[str, str]]:
    """Returns what one does with a run now: words, and the command with its real path."""
    folder = quote(str(run.folder.resolve()))
    if not run.finished:
        return [
            ("Go on from the last checkpoint", f"efficientllm prune --resume --out {folder}"),
            ("Set it beside other runs (name them after it)", f"efficientllm compare {folder}"),
        ]
    result = quote(str(run.folder.resolve() / "model"))
    prompt = " ".join(texts.samples[0]["prompt"].split()[:4]) if texts.samples else "Once upon a time"
    kind = run.config.get("for_type") or "f16"
    out = quote(f"{run.folder.resolve().name}-{kind}.gguf")
    text = run.config["valid"] if _is_text(run.config["valid"]) else None
    scored = f"--text {quote(text)}" if text else "--tasks commonsense"
    return [
        ("Let it write", f"efficientllm generate {result} {quote(prompt)}"),
        ("Put it on a device", f"efficientllm export {folder} --to gguf --type {kind} --out {out}"),
        ("Score it beside its source", f"efficientllm eval {folder} {quote(run.config['model'])} {scored}"),
        ("Set it beside other runs (name them after it)", f"efficientllm compare {folder}"),
    ]


def compare_command(runs: Named) -> str:
    """Returns the command that sets the same runs beside each other on a terminal."""
    return " ".join(["efficientllm compare", *(quote(str(run.folder.resolve())) for _, run in runs)])


def command(run: History) -> str:
    """Returns the command that makes the same run, a flag a line."""
    lines: list[list[str]] = [[]]
    for word in split(command_line(from_dict(run.config, str(run.folder)))):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(quote(word))
    return " \\\n  ".join(" ".join(words) for words in lines)


def settings(runs: Named) -> Table:
    """Returns every setting of one run, or those in which several differ."""
    if len(runs) == 1:
        return [["setting", "value"], *([name, _text(value)] for name, value in runs[0][1].config.items())]
    configs = [run.config for _, run in runs]
    differing = [name for name in configs[0] if len({_text(config.get(name)) for config in configs}) > 1]
    rows = [[name, *(_text(config.get(name)) for config in configs)] for name in differing]
    return [["setting", *(letter for letter, _ in runs)], *rows]


def weights_size(folder: Path) -> int:
    """Returns the bytes of a model folder's weights; 0 where there are none."""
    return sum(file.stat().st_size for file in _files(folder) if file.suffix in (".safetensors", ".bin"))


def name_of(run: History) -> str:
    """Returns what a run is called: its folder's name."""
    return run.folder.resolve().name


def _row(letter: str, run: History) -> list[str]:
    first, last = source_loss(run), last_loss(run)
    after = [each for tokens, each in run.valid_losses if tokens > 0]
    size = weights_size(run.folder / "model")
    return [
        f"{letter}: {name_of(run)}" + ("" if run.finished else " (not finished)"),
        f"{run.params:,}",
        percent(1 - run.params / run.source_params),
        MISSING if last is None else loss(last),
        MISSING if last is None or first is None else difference(last, first),
        MISSING if last is None else perplexity(last),
        loss(min(after)) if after else MISSING,
        format_count(run.tokens),
        duration(run.seconds),
        scientific(run.flops[-1]) if run.flops else MISSING,
        byte_size(size) if size else MISSING,
    ]


def _few(steps: Sequence[str], most: int = 6) -> str:
    return ", ".join(steps[:most]) + (f" and {len(steps) - most:,} more" if len(steps) > most else "")


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []


def _contents(folder: Path) -> str:
    """Returns what a folder of a run holds, in words."""
    inside = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    if folder.name == "model":
        return f"the result: {byte_size(weights_size(folder))} of weights, and its tokenizer"
    if folder.name == "models":
        return f"sizes saved on the way: {', '.join(inside)}"
    if folder.name == "checkpoints":
        return f"{len(inside)} checkpoint{'' if len(inside) == 1 else 's'}: {', '.join(inside)}"
    return "tokens to train on, and held out"


def _hardware(found: dict[str, Any]) -> str:
    """Returns a start's hardware in words."""
    if not found:
        return NOT_RECORDED
    threads, cores = (_counted(found.get(each), each) for each in ("threads", "cores"))
    cpu = f"{found.get('processor')}, {threads} on {cores}"
    processes = found.get("processes") or 1
    device = f"{found['gpu']}; {cpu}" if found.get("gpu") else cpu
    return device if processes == 1 else f"{processes} processes, each: {device}"


def _counted(number: Any, things: str) -> str:
    return f"{number} {things.removesuffix('s') if number == 1 else things}"


def _date(moment: str) -> str:
    return moment.replace("T", " ").replace("+00:00", " UTC")


def _is_text(valid: Any) -> bool:
    """Whether held-out text is a file that `eval --text` reads."""
    return valid is not None and Path(str(valid)).expanduser().is_file()


def _text(value: Any) -> str:
    if value is None:
        return MISSING
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
