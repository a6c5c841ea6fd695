"""How a run tells of itself: the command that makes it, and its shapes in the config's words."""

from shlex import quote

from efficientllm.space.dims import Shape, widths
from efficientllm.training.config import FIELDS, RunConfig, flag_name


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


def widths_text(shape: Shape) -> str:
    """Returns a shape in the config's words: "hidden_size 96, intermediate_size 40, …"."""
    return ", ".join(f"{key} {value}" for key, value in widths(shape).items())
