"""What results.json says beside the scores: versions, machine, command and date."""

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import quote
from typing import Any

from efficientllm import __version__

PACKAGES = ("lm_eval", "torch", "transformers", "tokenizers", "datasets")


def circumstances(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns, as JSON values, what a figure must be quoted with; `arguments` are those of the command line."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["efficientllm", *map(quote, arguments)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"efficientllm": __version__, "python": sys.version.split()[0], **_versions()},
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
            "system": platform.platform(),
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # lm_eval, where only text is scored
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
