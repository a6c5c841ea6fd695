"""What results.json says beside the scores: versions, machine, command and date."""

from collections.abc import Sequence
from shlex import quote
from typing import Any

from efficientllm.run.environment import hardware, now, versions

PACKAGES = ("lm_eval", "torch", "transformers", "tokenizers", "datasets")


def circumstances(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns, as JSON values, what a figure must be quoted with; `arguments` are those of the command line."""
    return {
        "command": " ".join(["efficientllm", *map(quote, arguments)]),
        "date": now(),
        "versions": versions(PACKAGES),
        "hardware": hardware(),
    }
