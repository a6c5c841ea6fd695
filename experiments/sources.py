"""Pretrains the source of a scale that has none ready, on the scale's own text.

    python experiments/sources.py --scale small [--inputs DIR] [--tokens N] [--compile]

Trains a tokenizer, makes token shards of the text, writes an untrained Llama and lets `efficientllm prune` train it
without removing anything. The source lies in runs/experiments/SCALE/source/model; broken off, the command goes on.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from demo_model.make_source import write_model
from scales import SCALES, Pretraining, Scale

from efficientllm.data.documents import parse_source, read_documents

INPUTS = Path(__file__).parent.parent / "inputs"  # README.md says what belongs there
RUNS = Path(__file__).parent.parent / "runs/experiments"
DOCUMENTS = 5_000  # that the tokenizer is trained on


def source_of(scale: Scale, inputs: Path) -> Path:
    """Returns the folder of a scale's source."""
    return inputs / scale.source if isinstance(scale.source, str) else RUNS / scale.name / "source/model"


def text_of(scale: Scale, inputs: Path) -> dict[str, Path]:
    """Returns what a scale trains and validates on: text, or token shards where the source is made here."""
    if isinstance(scale.source, str):
        return {"data": inputs / scale.data, "valid": inputs / scale.valid}
    return {"data": RUNS / scale.name / "train", "valid": RUNS / scale.name / "valid"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=[name for name, each in SCALES.items() if not isinstance(each.source, str)])
    parser.add_argument("--inputs", type=Path, default=INPUTS)
    parser.add_argument("--tokens", type=int, help="fewer tokens, to see whether it works")
    parser.add_argument("--compile", action="store_true", help="compile the layers; worth it on a GPU")
    asked = parser.parse_args()
    scale = SCALES[asked.scale]
    recipe, run, untrained = scale.source, RUNS / scale.name / "source", RUNS / scale.name / "untrained"
    assert isinstance(recipe, Pretraining)
    if not (untrained / "config.json").exists():
        sizes = {key: value for key, value in asdict(recipe).items() if key not in ("tokens", "batch_tokens", "lr")}
        write_model(texts(asked.inputs / scale.data), untrained, max_position_embeddings=2 * scale.seq_len, **sizes)
    shards = text_of(scale, asked.inputs)
    for part, text in (("data", scale.data), ("valid", scale.valid)):
        if not shards[part].exists():
            code = efficientllm("prepare", asked.inputs / text, "--tokenizer", untrained, "--out", shards[part])
            if code:
                return code
    if run.exists():
        return efficientllm("prune", "--resume", "--out", run)
    words = ["prune", untrained, "--init", "scratch", "--target-params", scale.params, "--out", run]
    words += ["--data", shards["data"], "--valid", shards["valid"], "--lr", recipe.lr]
    words += ["--tokens", asked.tokens or recipe.tokens, "--prune-tokens", asked.tokens or recipe.tokens]
    words += ["--seq-len", scale.seq_len, "--batch-tokens", recipe.batch_tokens]
    return efficientllm(*words, *(["--compile"] if asked.compile else []))


def efficientllm(*words: object) -> int:
    """Runs a command; returns its exit code."""
    return subprocess.call([sys.executable, "-m", "efficientllm", *map(str, words)])


def texts(data: Path) -> Iterator[str]:
    """Yields the documents that the tokenizer is trained on."""
    return islice(read_documents(parse_source(str(data))), DOCUMENTS)


if __name__ == "__main__":
    raise SystemExit(main())
