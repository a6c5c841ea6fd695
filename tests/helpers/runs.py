"""Short runs of `prune` on the shipped model, in this process or one of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.paths import DEMO_MODEL

STEPS, PRUNE_STEPS = 16, 10


TARGET = 560_000


SMALL = {
    "--target-params": str(TARGET),
    "--prune-tokens": str(PRUNE_STEPS * 512),
    "--tokens": str(STEPS * 512),
    "--seq-len": "64",
    "--batch-tokens": "512",
    "--valid-tokens": "2048",
    "--lr": "1e-3",
}


def arguments(data: Path, out: Path, **changed: str | None) -> list[str]:
    flags: dict[str, str | None] = {**SMALL, "--data": str(data), "--out": str(out)}
    flags.update({"--" + name.replace("_", "-"): value for name, value in changed.items()})
    return [
        "prune",
        str(DEMO_MODEL),
        *(word for flag, value in flags.items() if value is not None for word in (flag, value)),
    ]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(words: list[str], **settings: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "efficientllm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **settings,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def num_rows(out: Path) -> int:
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def result_bytes(out: Path) -> tuple[bytes, bytes]:
    return (out / "model/model.safetensors").read_bytes(), (out / "removals.jsonl").read_bytes()
