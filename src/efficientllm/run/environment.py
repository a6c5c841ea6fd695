"""environment.json of a run folder: on what machine, with which versions and when the run began and was resumed."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from efficientllm import __version__
from efficientllm.files import write_whole

FILE = "environment.json"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def add_start(folder: Path, step: int, ranks: int) -> None:
    """Adds this process's start at `step` to the folder's environment.json, whole or not at all."""
    start = {
        "step": step,
        "date": now(),
        "versions": versions(PACKAGES),
        "hardware": {**hardware(), "processes": ranks},
    }
    write_whole(folder / FILE, json.dumps([*read_starts(folder), start], indent=1) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Returns every start that a run folder records, the first one first; empty where the file is missing or broken."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []


def now() -> str:
    """Returns date and time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of this package, of Python, and of those of `packages` that are installed."""
    found = {"efficientllm": __version__, "python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Returns processor, cores, threads, GPU and system of this process, as JSON values."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
