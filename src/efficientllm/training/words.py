"""How a run tells of itself: the command that makes it, and its shapes in the config's words."""

from shlex import quote

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


def shape_words(shape: dict[str, int]) -> dict[str, int]:
    return {
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_attention_heads": shape["kv"] * shape["query"],
        "num_key_value_heads": shape["kv"],
    }


def shape_text(shape: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in shape_words(shape).items())
