"""Which shapes are legal: floors, tiles, and what a family's config accepts (docs/method.md section 10)."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

from efficientllm.errors import BudgetError
from efficientllm.numbers import format_count
from efficientllm.space.dims import Measure, Shape, Space, in_layer, kind_of, of_kind, shape_text
from efficientllm.space.families import HEADS_DIVIDE_HIDDEN

ROUND_ABOVE = 10_000_000  # parameters from which widths are kept at multiples of 64
DEFAULT_FLOORS = {"hidden": 32, "ffn": 32, "kv": 1, "query": 1}


@dataclass(frozen=True)
class Limits:
    """The legal sizes of every bundle: `source`, or a multiple of `tile` from `floor` up.

    Attributes:
        source: the shape pruning starts from.
        tile: units that must go together before the shape is legal again; 1 lets every size stand.
        floor: the least legal size; equal to the source where a bundle cannot shrink.
        notes: why a kind is frozen or has another tile than was asked, by kind.
    """

    source: Shape
    tile: dict[str, int]
    floor: Shape
    notes: dict[str, str]

    def close(self, shape: Shape) -> Shape:
        """Returns the shape with every open tile completed: the next legal shape at or below it."""
        return {bundle: self.close_bundle(bundle, size) for bundle, size in shape.items()}

    def close_bundle(self, bundle: str, size: int) -> int:
        return size if size == self.source[bundle] else size - size % self.tile[bundle]

    def legal_sizes(self, bundle: str, largest: int) -> list[int]:
        """Returns the legal sizes of a bundle from the least to `largest`, itself a legal size."""
        tile, floor = self.tile[bundle], self.floor[bundle]
        if floor == self.source[bundle]:
            return [floor]
        sizes = list(range(floor, largest + 1, tile))
        return sizes if sizes and sizes[-1] == largest else [*sizes, largest]


def find_limits(
    space: Space,
    config: Any,
    *,
    round_to: int | Mapping[str, int] | None = None,
    min_ffn: int | None = None,
    min_hidden: int | None = None,
    min_kv: int | None = None,
) -> Limits:
    """Returns the legal shapes of a model.

    `round_to` is a property of the result: FFN and hidden widths, and the columns of O, stay multiples of it (default 1
    below 10M parameters, 64 above). A kind that cannot be rounded so, or that the family's config would refuse, is
    frozen. By kind it may differ: for "hidden", "ffn" and "query", which are O's columns. All of it holds in every
    layer.
    """
    source = space.shape
    layers = [in_layer(source, layer) for layer in range(space.num_layers)]
    if round_to is None:
        round_to = 64 if space.num_params(source) >= ROUND_ABOVE else 1
    if isinstance(round_to, int):
        if round_to < 1:
            raise BudgetError(f"--round-to {round_to}: must be at least 1")
        round_to = dict.fromkeys(("hidden", "ffn", "query"), round_to)
    asked = {"hidden": min_hidden, "ffn": min_ffn, "kv": min_kv, "query": None}
    columns = round_to["query"]
    tile = {
        "hidden": round_to["hidden"],
        "ffn": round_to["ffn"],
        "kv": columns // gcd(columns, space.head_dim),
        "query": 1,
    }
    notes: dict[str, str] = {}
    frozen: set[str] = set()
    if any(layer["kv"] * space.head_dim % columns for layer in layers):
        frozen.add("query")
        notes["query"] = f"O's columns would not stay multiples of {columns}"
    if needs_heads_divide_hidden(config):
        most = {(layer["kv"], layer["query"]) for layer in layers}
        heads = lcm(*(kv * query for kvs, qs in most for kv in range(1, kvs + 1) for query in range(1, qs + 1)))
        if source["hidden"] % heads == 0:
            tile["hidden"] = lcm(tile["hidden"], heads)
        else:
            frozen |= {"kv", "query"}
            tile["hidden"] = lcm(tile["hidden"], *(kv * query for kv, query in most))
            notes["kv"] = notes["query"] = f"{config.model_type} requires hidden_size % num_attention_heads == 0"
        if tile["hidden"] != round_to["hidden"]:
            notes["hidden"] = f"{config.model_type} requires hidden_size % num_attention_heads == 0"
    floor: Shape = {}
    for bundle, size in source.items():
        kind = kind_of(bundle)
        unit, most_of_kind = tile[kind], max(of_kind(source, kind).values())
        least = DEFAULT_FLOORS[kind] if asked[kind] is None else asked[kind]
        if least is None or least < 1:
            raise BudgetError(f"--min-{kind} {least}: layers are never emptied, so it must be at least 1")
        if asked[kind] is not None and least > most_of_kind:
            raise BudgetError(f"--min-{kind} {least}: the source has only {most_of_kind}; ask for at most that")
        least = -(-least // unit) * unit
        if kind in frozen or least >= size:
            # the default floor is no floor for a model that is as small; for its smaller layers it is
            may_go_lower = kind not in frozen and asked[kind] is None and unit < size and size % unit == 0
            may_go_lower = may_go_lower and least >= most_of_kind
            least = unit if may_go_lower else size
        floor[bundle] = least
    return Limits(source, {bundle: tile[kind_of(bundle)] for bundle in source}, floor, notes)


def needs_heads_divide_hidden(config: Any) -> bool:
    """Returns whether the family's config refuses hidden sizes that the number of heads does not divide."""
    if config.model_type == "llama":
        return has_llama_bias(config)
    return config.model_type in HEADS_DIVIDE_HIDDEN


def has_llama_bias(config: Any) -> bool:
    return bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))


def check_target(
    space: Space,
    limits: Limits,
    target: int,
    name: str = "--target-params",
    measure: Measure | None = None,
    unit: str = "parameters",
) -> None:
    """Raises BudgetError if the target lies above the source or below the smallest reachable size."""
    measure = measure or space.num_params
    source, least = measure(limits.source), measure(limits.floor)
    if target < 1:
        raise BudgetError(f"{name} {target}: must be a positive number of {unit}")
    if target > source:
        raise BudgetError(
            f"{name} {format_count(target)} ({target:,}) is above the source's {source:,} {unit}; "
            "ask for the source's size or less"
        )
    if target < least:
        embedding = space.vocab_size * limits.floor["hidden"]
        raise BudgetError(
            f"{name} {format_count(target)} ({target:,}) is below the smallest reachable size {least:,} {unit} (the "
            f"embedding alone holds {embedding:,} parameters; floors: {shape_text(limits.floor)}). Raise {name} or "
            "lower --min-hidden, --min-ffn, --min-kv or --round-to."
        )
