"""find_space(model): reads a model's parameters against its family's table."""

from collections import defaultdict
from typing import Any

from torch import nn

from efficientllm.errors import UnsupportedModelError
from efficientllm.space.cost import Polynomial
from efficientllm.space.dims import KINDS, Bundle, Dim, Role, Slot, Space
from efficientllm.space.families import FAMILIES, REFUSED, Label

OUTPUT_LAYERS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")


def find_space(model: nn.Module) -> Space:
    """Returns the pruning space of a decoder model, on any device, `meta` included.

    Raises:
        UnsupportedModelError: if the family is unknown, a parameter has no row in its table, or an axis has another
            length than the config says.
    """
    config: Any = model.config
    family: str = config.model_type
    if family not in FAMILIES:
        reason = REFUSED.get(family, "no table of axis labels")
        raise UnsupportedModelError(
            f"{family}: cannot be pruned ({reason}). Supported: {', '.join(FAMILIES)}. "
            "To add a family, see docs/families.md."
        )
    table = FAMILIES[family]
    num_layers: int = config.num_hidden_layers
    num_kv: int = config.num_key_value_heads
    group: int = config.num_attention_heads // num_kv
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = {
        "vocab": config.vocab_size,
        "head_dim": head_dim,
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "kv": num_kv * head_dim,
        "query": num_kv * group * head_dim,
    }
    costs = {
        "vocab": Polynomial.of(config.vocab_size),
        "head_dim": Polynomial.of(head_dim),
        "hidden": Polynomial.of(1, "hidden"),
        "ffn": Polynomial.of(1, "ffn"),
        "kv": Polynomial.of(head_dim, "kv"),
        "query": Polynomial.of(head_dim, "kv", "query"),
    }

    slots: dict[str, list[Slot]] = defaultdict(list)
    axes: dict[str, tuple[tuple[str, ...], ...]] = {}
    num_params = Polynomial({})
    for name, param in model.named_parameters():  # a tied tensor comes once, under its first name
        labels = _labels(name, table, family, tuple(param.shape))
        axes[name] = tuple((label,) if isinstance(label, str) else label for label in labels)
        cost = Polynomial.of(1)
        for axis, parts in enumerate(axes[name]):
            if sum(lengths[part] for part in parts) != param.shape[axis]:
                raise UnsupportedModelError(
                    f"{family}: axis {axis} of '{name}' has {param.shape[axis]} entries, its config says "
                    f"{sum(lengths[part] for part in parts)} ({' + '.join(parts)}). Per-layer widths are not supported."
                )
            start = 0
            axis_cost = Polynomial({})
            for part in parts:
                role, output = _role(name, axis, param.ndim)
                for dim, block, offset in _owners(part, name, num_kv, group, head_dim):
                    slots[dim].append(Slot(name, axis, block, start + offset, role, output))
                start += lengths[part]
                axis_cost += costs[part]
            cost *= axis_cost
        num_params += cost

    names: dict[str, list[tuple[str, int | None]]] = {
        "hidden": [("hidden", None)],
        "ffn": [(f"layers.{i}.ffn", i) for i in range(num_layers)],
        "kv": [(f"layers.{i}.kv", i) for i in range(num_layers)],
        "query": [(f"layers.{i}.query.{g}", i) for i in range(num_layers) for g in range(num_kv)],
    }
    sizes = {"hidden": config.hidden_size, "ffn": config.intermediate_size, "kv": num_kv, "query": group}
    bundles = {
        kind: Bundle(
            kind, tuple(Dim(name, kind, layer, sizes[kind], tuple(slots[name])) for name, layer in names[kind])
        )
        for kind in KINDS
    }
    tied = tuple(
        sorted(set(dict(model.named_parameters(remove_duplicate=False))) - set(dict(model.named_parameters())))
    )
    return Space(bundles, num_params, head_dim, num_layers, config.vocab_size, tied, axes, costs)


def _labels(name: str, table: dict[str, tuple[Label, ...]], family: str, shape: tuple[int, ...]) -> tuple[Label, ...]:
    for suffix, labels in table.items():
        if (name == suffix or name.endswith("." + suffix)) and len(labels) == len(shape):
            return labels
    raise UnsupportedModelError(
        f"{family}: no axis labels for '{name}' {shape}. Add the family to space/families.py "
        "(docs/families.md shows how)."
    )


def _role(name: str, axis: int, ndim: int) -> tuple[Role, bool]:
    """Returns what an axis is to the units that own its entries, and whether it is an output layer's."""
    output = name.endswith(OUTPUT_LAYERS)
    if "norm" in name.rsplit(".", 2)[-2]:
        return "rider", False
    if name.endswith("embed_tokens.weight"):
        return "producer", output
    if ndim == 1 or (axis == 0 and not name.endswith("lm_head.weight")):
        return "producer", output
    return "consumer", output


def _owners(label: str, param: str, num_kv: int, group: int, head_dim: int) -> list[tuple[str, int, int]]:
    """Returns (dim, block, offset) of every dim that owns entries of an axis part with this label."""
    if label in ("vocab", "head_dim"):
        return []
    if label == "hidden":
        return [("hidden", 1, 0)]
    layer = param.split(".layers.")[1].split(".")[0]
    if label == "ffn":
        return [(f"layers.{layer}.ffn", 1, 0)]
    if label == "kv":
        return [(f"layers.{layer}.kv", head_dim, 0)]
    queries = [(f"layers.{layer}.query.{g}", head_dim, g * group * head_dim) for g in range(num_kv)]
    return [(f"layers.{layer}.kv", group * head_dim, 0), *queries]
