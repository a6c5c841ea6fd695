"""The command that makes a run. Imports no torch."""

from shlex import quote

from efficientllm.config.run_config import FIELDS, RunConfig, flag_name


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
