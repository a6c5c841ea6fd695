"""What the experiments share: runs of `efficientllm prune` that differ in a few flags, and tables of what came of them.

    python experiments/NAME/run.py [--scale tiny] [--inputs DIR] [--seeds 1 2 3] [--jobs 2] [--only RUN...]
    python experiments/NAME/run.py --table

Runs what is missing, `--jobs` at a time with one thread each, and goes on with what was broken off; then prints the
table and writes it to the experiment's results-SCALE.md. Experiments that name the same run share it. A run's folder is
runs/experiments/SCALE/NAME-sSEED; its metrics, removals and config are kept in experiments/results.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scales import SCALES, Scale
from sources import INPUTS, source_of, text_of

from efficientllm.report.history import read_run

HERE = Path(__file__).parent.resolve()
KEPT = ("metrics.jsonl", "removals.jsonl")


@dataclass(frozen=True)
class Run:
    """One run, to be made with every seed.

    Attributes:
        name: its folder's.
        flags: flags of `prune` that differ from the scale's, by name; True for a switch, None to leave one out.
        shape_of: the run whose final shape it takes, of the same seed.
        source: another model than the scale's, a path below the repository.
        seeds: how many of the seeds it is made with (default: all).
    """

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    shape_of: str | None = None
    seeds: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class Result:
    """What came of one run: metrics.jsonl, removals.jsonl, and all FLOPs of its training, a teacher's included."""

    seed: int
    rows: list[dict[str, Any]]
    removals: list[dict[str, Any]]
    flops: float

    @property
    def losses(self) -> list[float]:
        return [row["valid_loss"] for row in self.rows if "valid_loss" in row]

    @property
    def final(self) -> float:
        return self.losses[-1]

    @property
    def params(self) -> int:
        return int(self.rows[-1]["params"])

    @property
    def tokens(self) -> int:
        return int(self.rows[-1]["tokens"])


Results = dict[str, list[Result]]


def main(doc: str, file: str, runs: Callable[[Scale], Sequence[Run]], table: Callable[[Results, Scale], str]) -> None:
    """The command line of an experiment."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--inputs", type=Path, default=INPUTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="RUN", help="make these runs alone")
    parser.add_argument("--compile", action="store_true", help="compile the layers; worth it on a GPU")
    parser.add_argument("--table", action="store_true", help="run nothing; only the table of what is there")
    asked = parser.parse_args()
    scale = SCALES[asked.scale]
    wanted = runs(scale)
    if unknown := set(asked.only or ()) - {run.name for run in wanted}:
        parser.error(f"--only: no run {', '.join(sorted(unknown))}; there are {', '.join(run.name for run in wanted)}")
    if not asked.table:
        made = [run for run in wanted if not asked.only or run.name in asked.only]
        if asked.compile:
            made = [replace(run, flags={"compile": True, **run.flags}) for run in made]
        execute(made, scale, asked.inputs, asked.seeds, asked.jobs)
    results = {run.name: found for run in wanted if (found := load(run, asked.scale, asked.seeds))}
    for run in wanted:
        done = [result.seed for result in results.get(run.name, [])]
        print(f"{run.name}: seeds {', '.join(map(str, done)) or 'none'}", file=sys.stderr)
    text = table(results, scale)
    print(text)
    command = f"python experiments/{Path(file).parent.name}/run.py --scale {asked.scale}"
    head = f"<!-- {command} --table; hardware and date: README.md -->"
    (Path(file).parent / f"results-{asked.scale}.md").write_text(f"{head}\n\n{text}\n")


def execute(wanted: Sequence[Run], scale: Scale, inputs: Path, seeds: list[int], jobs: int) -> None:
    """Makes the runs that are missing; one whose shape another takes comes first."""
    name = scale.name
    waiting = [(run, seed) for position in range(len(seeds)) for run in wanted for seed in chosen(run, seeds, position)]
    waiting = [(run, seed) for run, seed in waiting if not kept(run.name, name, seed).exists()]
    under_way: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    failed: set[tuple[str, int]] = set()
    while waiting or under_way:
        for run, seed in list(waiting):
            needs = run.shape_of and not (folder(run.shape_of, name, seed) / "model").exists()
            if needs and (run.shape_of, seed) in failed:
                waiting.remove((run, seed))
                failed.add((run.name, seed))
            elif len(under_way) < jobs and not needs:
                waiting.remove((run, seed))
                under_way[run.name, seed] = start(run, scale, inputs, seed)
                print(f"{time.strftime('%H:%M:%S')} {run.name}-s{seed} ({len(waiting)} wait)", file=sys.stderr)
        time.sleep(1)
        for key, process in list(under_way.items()):
            if process.poll() is None:
                continue
            del under_way[key]
            if process.returncode:
                failed.add(key)
                log = log_of(folder(key[0], name, key[1]))
                print(f"{key[0]}-s{key[1]} failed; see {log}", file=sys.stderr)
            else:
                keep(*key, name, inputs)
        if waiting and not under_way and all(run.shape_of for run, _ in waiting):
            missing = {run.shape_of for run, seed in waiting if not (folder(run.shape_of or "", name, seed)).exists()}
            raise SystemExit(f"runs wait for the shapes of {', '.join(map(str, missing))}, which nothing makes")


def start(run: Run, scale: Scale, inputs: Path, seed: int) -> "subprocess.Popen[bytes]":
    out = folder(run.name, scale.name, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    words = ["prune", "--resume", "--out", str(out)]
    if not out.exists():
        text = text_of(scale, inputs)
        flags: dict[str, Any] = {**text, **scale.flags(), "seed": seed, "threads": 1, "out": out, **run.flags}
        if run.shape_of:
            flags["shape_of"] = folder(run.shape_of, scale.name, seed)
        words = ["prune", str(HERE.parent / run.source if run.source else source_of(scale, inputs))]
        for flag, value in flags.items():
            if value is not None:
                words += ["--" + flag.replace("_", "-")] + ([] if value is True else [str(value)])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = log_of(out).open("wb")
    return subprocess.Popen([sys.executable, "-m", "efficientllm", *words], stdout=log, stderr=log, env=env)


def chosen(run: Run, seeds: list[int], position: int) -> list[int]:
    return seeds[position : position + 1] if run.seeds is None or position < run.seeds else []


def folder(run: str, name: str, seed: int) -> Path:
    return HERE.parent / "runs/experiments" / name / f"{run}-s{seed}"


def log_of(run: Path) -> Path:
    """Returns what a run prints into; its name may hold a point."""
    return run.with_name(f"{run.name}.log")


def kept(run: str, name: str, seed: int) -> Path:
    return HERE / "results" / name / f"{run}-s{seed}"


def keep(run: str, seed: int, name: str, inputs: Path) -> None:
    """Keeps what the tables are made from, and the run's config, with paths from the repository's root."""
    source, target = folder(run, name, seed), kept(run, name, seed)
    target.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (source / file).exists():
            with gzip.GzipFile(target / f"{file}.gz", "wb", mtime=0) as packed:
                packed.write(from_root((source / file).read_text(), inputs).encode())
    for config in (*source.glob("config.*"), source / "model/config.json"):
        kept_as = target / ("model.json" if config.parent.name == "model" else config.name)
        kept_as.write_text(from_root(config.read_text(), inputs))
    flops = read_run(source).flops
    (target / "flops.json").write_text(json.dumps(flops[-1] if flops else None))


def from_root(text: str, inputs: Path) -> str:
    """Returns the text without this machine's folders: `inputs/` is wherever the inputs stood."""
    return text.replace(f"{inputs.resolve()}/", "inputs/").replace(f"{HERE.parent}/", "")


def load(run: Run, name: str, seeds: list[int]) -> list[Result]:
    """Returns what is kept of a run, by seed."""
    found = []
    for seed in seeds:
        place = kept(run.name, name, seed)
        if place.exists():
            rows, removals = (read(place / f"{file}.gz") for file in KEPT)
            found.append(Result(seed, rows, removals, json.loads((place / "flops.json").read_text())))
    return found


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(path, "rt")] if path.exists() else []


def loss_table(results: Results, names: dict[str, str], against: str | None = None) -> str:
    """Returns a Markdown table: size, FLOPs, final loss, its mean over seeds, and its distance from one of the runs."""
    lines = ["| run | parameters | FLOPs | loss, by seed | mean ± s.e. |", "|---|---|---|---|---|"]
    if against:
        lines = [lines[0] + f" {names[against]} is better by |", lines[1] + "---|"]
    for name, text in names.items():
        if name not in results:
            lines.append(f"| {text} | not run | | | |" + (" |" if against else ""))
            continue
        found = results[name]
        cells = [text, f"{found[0].params:,}", f"{mean(each.flops for each in found):.3g}"]
        cells.append(", ".join(f"{each.final:.3f}" for each in found))
        cells.append(with_error([each.final for each in found]))
        if against:
            other = {each.seed: each.final for each in results.get(against, [])}
            gaps = [each.final - other[each.seed] for each in found if each.seed in other]
            cells.append(with_error(gaps, "+.3f") if gaps and name != against else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_error(values: Sequence[float], form: str = ".3f") -> str:
    """Returns the mean and its standard error as text."""
    if len(values) < 2:
        return format(mean(values), form)
    return f"{mean(values):{form}} ± {stdev(values) / len(values) ** 0.5:.3f}"
