"""Commands that a person can type: the one that makes a run, and how this program is called here. Imports no torch."""

import shutil
import sys
from pathlib import Path
from shlex import quote

from efficientllm.config.run_config import FIELDS, RunConfig, flag_name


def program() -> str:
    """Returns how this program is called from the shell that it was started in.

    By its name, or by its Python where the name is not on the PATH, as after `make demo`.
    """
    if shutil.which("efficientllm"):
        return "efficientllm"
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return f"{quote(str(python))} -m efficientllm"


def command_line(config: RunConfig) -> str:
    """Returns the command that makes the same run."""
    words = ["efficientllm", "prune", quote(config.model)]
    for name, each in FIELDS.items():
        value = getattr(config, name)
        if name == "model" or value is None or value == each.default:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [flag_name(name)] if item is True else [flag_name(name), quote(str(item))]
    return " ".join(words)
