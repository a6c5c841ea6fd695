"""find_space(model): reads a model's parameters against its family's table."""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from efficientllm.errors import UnsupportedModelError
from efficientllm.space.cost import Polynomial
from efficientllm.space.dims import KINDS, Bundle, Dim, Role, Slot, Space, dim_name, kind_of, layer_of
from efficientllm.space.families import FAMILIES, Label, check_family

if TYPE_CHECKING:
    from torch import nn

OUTPUT_LAYERS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class _Layer:
    """A layer's sizes as its config says; `prefix` begins the names of its bundles."""

    prefix: str
    num_kv: int
    group: int
    ffn: int


def find_space(model: "nn.Module", per_layer: bool = False) -> Space:
    """Returns the pruning space of a decoder model, on any device, `meta` included.

    Args:
        per_layer: whether layers shrink each on its own, and may end with different widths.

    Raises:
        UnsupportedModelError: if the family is unknown, a parameter has no row in its table, or an axis has another
            length than the config says.
    """
    config: Any = model.config
    family: str = config.model_type
    check_family(family)
    table = FAMILIES[family]
    if config.is_heterogeneous and not per_layer:
        raise UnsupportedModelError(
            f"{family}: the layers of this model differ in width; prune it with --layout per-layer"
        )
    own: Any = config.per_layer_config[0]
    head_dim: int = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    layers = [
        _Layer(
            f"layers.{number}." if per_layer else "",
            each.num_key_value_heads,
            each.num_attention_heads // each.num_key_value_heads,
            each.intermediate_size,
        )
        for number, each in enumerate(config.per_layer_config)
    ]
    lengths = {"vocab": config.vocab_size, "head_dim": head_dim, "hidden": config.hidden_size}
    costs = {
        "vocab": Polynomial.of(config.vocab_size),
        "head_dim": Polynomial.of(head_dim),
        "hidden": Polynomial.of(1, "hidden"),
    }
    for layer in layers:
        ffn, kv, query = (layer.prefix + kind for kind in ("ffn", "kv", "query"))
        lengths |= {ffn: layer.ffn, kv: layer.num_kv * head_dim, query: layer.num_kv * layer.group * head_dim}
        costs |= {
            ffn: Polynomial.of(1, ffn),
            kv: Polynomial.of(head_dim, kv),
            query: Polynomial.of(head_dim, kv, query),
        }

    slots: dict[str, list[Slot]] = defaultdict(list)
    axes: dict[str, tuple[tuple[str, ...], ...]] = {}
    num_params = Polynomial({})
    for name, param in model.named_parameters():  # a tied tensor comes once, under its first name
        labels = _labels(name, table, family, tuple(param.shape))
        number = layer_of(name)
        prefix = layers[number].prefix if number is not None else ""
        axes[name] = tuple(
            tuple(each if each in ("vocab", "head_dim", "hidden") else prefix + each for each in parts)
            for parts in ((label,) if isinstance(label, str) else label for label in labels)
        )
        cost = Polynomial.of(1)
        for axis, parts in enumerate(axes[name]):
            if sum(lengths[part] for part in parts) != param.shape[axis]:
                raise UnsupportedModelError(
                    f"{family}: axis {axis} of '{name}' has {param.shape[axis]} entries, but its config says "
                    f"{sum(lengths[part] for part in parts)} ({' + '.join(parts)}); get both from one source"
                )
            start = 0
            axis_cost = Polynomial({})
            for part in parts:
                role, output = _role(name, axis, param.ndim)
                for dim, block, offset in _owners(kind_of(part), number, layers, head_dim):
                    slots[dim].append(Slot(name, axis, block, start + offset, role, output))
                start += lengths[part]
                axis_cost += costs[part]
            cost *= axis_cost
        num_params += cost

    dims: dict[str, list[Dim]] = defaultdict(list)  # by bundle
    dims["hidden"] = [Dim("hidden", None, None, config.hidden_size, tuple(slots["hidden"]))]
    for kind in KINDS[1:]:
        for number, layer in enumerate(layers):
            size = {"ffn": layer.ffn, "kv": layer.num_kv, "query": layer.group}[kind]
            for group in range(layer.num_kv) if kind == "query" else (None,):
                owned = tuple(slots[dim_name(kind, number, group)])
                dims[layer.prefix + kind].append(Dim(kind, number, group, size, owned))
    bundles = {name: Bundle(kind_of(name), tuple(each)) for name, each in dims.items()}
    tied = tuple(
        sorted(set(dict(model.named_parameters(remove_duplicate=False))) - set(dict(model.named_parameters())))
    )
    return Space(bundles, num_params, head_dim, len(layers), config.vocab_size, tied, axes, costs)


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


def _owners(kind: str, number: int | None, layers: list[_Layer], head_dim: int) -> list[tuple[str, int, int]]:
    """Returns (dim, block, offset) of every dim that owns entries of a part of an axis, in layer `number`."""
    if kind in ("vocab", "head_dim"):
        return []
    if kind == "hidden":
        return [("hidden", 1, 0)]
    assert number is not None
    if kind == "ffn":
        return [(dim_name("ffn", number), 1, 0)]
    if kind == "kv":
        return [(dim_name("kv", number), head_dim, 0)]
    num_kv, group = layers[number].num_kv, layers[number].group
    queries = [(dim_name("query", number, g), head_dim, g * group * head_dim) for g in range(num_kv)]
    return [(dim_name("kv", number), group * head_dim, 0), *queries]
