"""The real tiny model: stories260K to 130k parameters, and what the pruning costs beside plain training.

    python benchmarks/stories.py inputs [--seeds 0 1] [flags of prune, such as --compensate]

Runs plain training (target equal to the source) and pruning of as many steps, one after the other, for every seed, and
prints the losses on the held-out stories and the ratio of their times.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from efficientllm.cli import main

SOURCE_PARAMS, TARGET = 260_032, 130_000


def run(inputs: Path, out: Path, target: int, seed: int, more: list[str]) -> tuple[float, list[dict[str, float]]]:
    """Returns the seconds between the first and the last row, and the rows that have a validation loss."""
    stories = inputs / "data/tinystories"
    words = ["prune", str(inputs / "models/stories260K"), "--data", str(stories / "train.jsonl")]
    words += ["--valid", str(stories / "valid.jsonl"), "--target-params", str(target), "--prune-tokens", "614400"]
    words += ["--tokens", "1228800", "--seq-len", "256", "--batch-tokens", "2048", "--lr", "3e-3"]
    words += ["--seed", str(seed), "--out", str(out), *more]
    if main(words):
        raise SystemExit(2)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = sum((row["tokens_per_second"] and 2048 / row["tokens_per_second"]) or 0.0 for row in rows)
    return seconds, [row for row in rows if "valid_loss" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments, more = parser.parse_known_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            plain, _ = run(arguments.inputs, Path(folder) / f"plain-{seed}", SOURCE_PARAMS, seed, [])
            pruning, rows = run(arguments.inputs, Path(folder) / f"pruned-{seed}", TARGET, seed, more)
            results.append((seed, rows, plain, pruning))
    print(f"\n{time.strftime('%Y-%m-%d')} {' '.join(more)}")
    print("seed  source  after pruning  result  above source  parameters  seconds plain  pruning  ratio")
    for seed, rows, plain, pruning in results:
        losses = [row["valid_loss"] for row in rows]
        print(
            f"{seed:4d}  {losses[0]:.4f}  {losses[1]:13.4f}  {losses[-1]:.4f}  {losses[-1] - losses[0]:12.4f}  "
            f"{rows[-1]['params']:10,}  {plain:13.1f}  {pruning:7.1f}  {pruning / plain:5.2f}"
        )
