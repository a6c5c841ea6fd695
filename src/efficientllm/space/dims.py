"""The words of the pruning space: slot, dim, bundle (docs/method.md section 2).

A *unit* is the least thing that can go: one hidden dimension, one FFN channel, one KV group (a key/value head with its
query heads), or one query head out of every KV group. A *dim* is the list of places in parameters that its units own; a
*bundle* is the dims that shrink in lockstep, one unit each: the paper's minimal parameter group.

A bundle holds the same dim of all layers and is named by its kind ("ffn"), or, in the per-layer layout, one layer's
("layers.3.ffn"); the hidden dimensions are one bundle in either, for all layers share the residual stream.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from efficientllm.space.cost import Polynomial

Role = Literal["producer", "consumer", "rider"]
Shape = dict[str, int]  # units left in each dim of a bundle, by the bundle's name; within a kind, layer by layer
Measure = Callable[[Shape], int]  # parameters or bytes of a shape; never falls as a shape grows

KINDS = ("hidden", "ffn", "kv", "query")


def kind_of(bundle: str) -> str:
    """Returns the kind of a bundle from its name: "ffn" of "ffn" and of "layers.3.ffn"."""
    return bundle.rpartition(".")[2]


def dim_name(kind: str, layer: int | None = None, group: int | None = None) -> str:
    """Returns the name of a dim: "hidden", "layers.3.ffn", or "layers.3.query.1" of the query heads of a KV group."""
    if layer is None:
        return kind
    return f"layers.{layer}.{kind}" + (f".{group}" if group is not None else "")


def layer_of(path: str) -> int | None:
    """Returns the layer that a parameter or module is in, None for those outside."""
    _, inside, rest = f".{path}".partition(".layers.")
    return int(rest.partition(".")[0]) if inside else None


def in_layer(shape: Shape, layer: int) -> Shape:
    """Returns a layer's sizes by kind, in either layout."""
    return {kind: shape[kind] if kind in shape else shape[f"layers.{layer}.{kind}"] for kind in KINDS}


def of_kind(shape: Shape, kind: str) -> Shape:
    """Returns the bundles of a kind with their sizes: one, or one a layer."""
    if kind in shape:
        return {kind: shape[kind]}
    return {name: size for name, size in shape.items() if kind_of(name) == kind}


def widths(shape: Shape) -> dict[str, int | list[int]]:
    """Returns a shape in a Hugging Face config's words; a list, layer by layer, where layers differ."""
    ffn, kv, query = (list(of_kind(shape, kind).values()) for kind in ("ffn", "kv", "query"))
    heads = [groups * each for groups, each in zip(kv, query, strict=True)]
    found = {"intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": kv}
    return {"hidden_size": shape["hidden"], **{name: alike(sizes) for name, sizes in found.items()}}


def alike(sizes: list[int]) -> int | list[int]:
    """Returns the size that all layers have, or all of them."""
    return sizes[0] if len(set(sizes)) == 1 else sizes


def size_text(sizes: int | list[int]) -> str:
    """Returns a size, or the range of layers' sizes, as a person reads it: "1,536" or "480-1,536"."""
    return f"{sizes:,}" if isinstance(sizes, int) else f"{min(sizes):,}-{max(sizes):,}"


def shape_text(shape: Shape) -> str:
    """Returns a shape by kinds as a person reads it: "hidden 96, ffn 32-40, kv 1-3, query 2"."""
    return ", ".join(f"{kind} {size_text(alike(list(of_kind(shape, kind).values())))}" for kind in KINDS)


def widths_text(shape: Shape) -> str:
    """Returns a shape in the config's words: "hidden_size 96, intermediate_size 40, …"."""
    return ", ".join(f"{key} {value}" for key, value in widths(shape).items())


@dataclass(frozen=True)
class Slot:
    """Unit `u` of the slot's dim owns entries [start + u·block, start + (u+1)·block) of `axis` of `param`.

    Attributes:
        role: producers write the unit's activation, consumers read it; riders (norm gains) are dropped at compaction,
            never zeroed and never scored.
        output: whether its entries are scored when only output layers are (docs/method.md section 3).
    """

    param: str
    axis: int
    block: int
    start: int
    role: Role
    output: bool


@dataclass(frozen=True)
class Dim:
    """A named axis of the model that can shrink: "hidden", "layers.3.ffn", "layers.3.kv", "layers.3.query.1".

    Attributes:
        layer: None for the hidden dimensions, which all layers share.
        group: the KV group whose query heads these are; None for the other kinds.
    """

    kind: str
    layer: int | None
    group: int | None
    size: int
    slots: tuple[Slot, ...]

    @cached_property
    def name(self) -> str:
        return dim_name(self.kind, self.layer, self.group)


@dataclass(frozen=True)
class Bundle:
    """Dims that shrink in lockstep; one unit of every dim in it is a minimal parameter group."""

    kind: str
    dims: tuple[Dim, ...]

    @property
    def size(self) -> int:
        """Units in each of its dims."""
        return self.dims[0].size if self.dims else 1


@dataclass(frozen=True)
class Space:
    """The pruning space of one model at one shape; rebuilt after every compaction.

    Attributes:
        bundles: by name, in the order hidden, ffn, kv, query, and within a kind layer by layer.
        num_params: parameters as a polynomial in the bundles' units, tied ones counted once.
        tied: names of parameters that are another parameter's tensor.
        axes: by parameter, the labels (see families.py) of the parts of each axis, in storage order; with its layer's
            name before it where bundles are a layer's.
        lengths: entries of a part as a polynomial in the bundles' units, by label.
    """

    bundles: dict[str, Bundle]
    num_params: Polynomial
    head_dim: int
    num_layers: int
    vocab_size: int
    tied: tuple[str, ...]
    axes: dict[str, tuple[tuple[str, ...], ...]]
    lengths: dict[str, Polynomial]

    @property
    def shape(self) -> Shape:
        return {name: bundle.size for name, bundle in self.bundles.items()}

    @property
    def per_layer(self) -> bool:
        """Whether bundles are those of one layer each."""
        return "ffn" not in self.bundles

    def dims(self) -> Iterator[Dim]:
        for bundle in self.bundles.values():
            yield from bundle.dims

    def flops_per_token(self, shape: Shape, seq_len: int) -> float:
        """Floating-point operations of one training token: forward and backward, 6 a matrix weight plus attention.

        The head's product counts even when it is tied, the embedding's look-up does not; attention is causal, so a
        token meets seq_len / 2 others on the average, with two products forward and four backward.
        """
        matrices = self.num_params(shape)
        if not self.tied:
            matrices -= self.vocab_size * shape["hidden"]
        layers = [in_layer(shape, layer) for layer in range(self.num_layers)]
        heads = sum(sizes["kv"] * sizes["query"] for sizes in layers)
        return 6 * matrices + 12 * heads * self.head_dim * seq_len / 2
