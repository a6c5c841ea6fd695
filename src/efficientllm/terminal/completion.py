"""`efficientllm completion`: a script that completes verbs, flags and their values in a shell. Imports no torch."""

from argparse import ArgumentParser
from collections.abc import Mapping
from typing import Any

from efficientllm.config.run_config import GGUF_TYPES
from efficientllm.planning.gpus import GPUS

FILES = {"FILE", "YAML", "JSON", "DATA", "MODEL"}  # metavars of what may be a file or a folder
FOLDERS = {"DIR", "RUN", "TEACHER"}
VALUES = {"TYPE": GGUF_TYPES, "--gpu": tuple(GPUS)}  # by metavar or flag


def completion_script(parser: ArgumentParser, verbs: Mapping[str, ArgumentParser], shell: str) -> str:
    """Returns the script; a shell that has read it never starts Python to complete."""
    import shtab

    for verb in verbs.values():
        for action in verb._actions:
            _describe(action, shtab)
    script: str = shtab.complete(parser, shell)
    return script


def _describe(action: Any, shtab: Any) -> None:
    """Tells shtab what a flag takes, from its metavar: `bash|zsh` are values, FILE is a file."""
    metavar = action.metavar or ""
    if known := [VALUES[name] for name in (metavar, *action.option_strings) if name in VALUES]:
        action.choices = known[0]
    elif "|" in metavar:
        action.choices = metavar.split("|")
    elif metavar in FILES:
        action.complete = shtab.FILE
    elif metavar in FOLDERS:
        action.complete = shtab.DIRECTORY
