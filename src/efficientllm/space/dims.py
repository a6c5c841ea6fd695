"""The words of the pruning space: slot, dim, bundle (design: "a model is a table of named dims").

A *unit* is the least thing that can go: one hidden dimension, one FFN channel, one KV group (a key/value head with its
query heads), or one query head out of every KV group. A *dim* is the list of places in parameters that its units own; a
*bundle* is the dims that shrink in lockstep, one unit each: the paper's minimal parameter group.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from efficientllm.space.cost import Polynomial

Role = Literal["producer", "consumer", "rider"]
Shape = dict[str, int]  # units left in each dim of a bundle, by bundle name
Measure = Callable[[Shape], int]  # parameters or bytes of a shape; never falls as a shape grows

KINDS = ("hidden", "ffn", "kv", "query")


@dataclass(frozen=True)
class Slot:
    """Unit `u` of the slot's dim owns entries [start + u·block, start + (u+1)·block) of `axis` of `param`.

    Attributes:
        role: producers write the unit's activation, consumers read it; riders (norm gains) are dropped at compaction,
            never zeroed and never scored.
        output: whether its entries are scored when only output layers are (method.md section 3).
    """

    param: str
    axis: int
    block: int
    start: int
    role: Role
    output: bool


@dataclass(frozen=True)
class Dim:
    """A named axis of the model that can shrink: "hidden", "layers.3.ffn", "layers.3.kv", "layers.3.query.1"."""

    name: str
    kind: str
    layer: int | None
    size: int
    slots: tuple[Slot, ...]


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
        bundles: by kind, in the order hidden, ffn, kv, query.
        num_params: parameters as a polynomial in the bundles' units, tied ones counted once.
        tied: names of parameters that are another parameter's tensor.
        axes: by parameter, the labels (see families.py) of the parts of each axis, in storage order.
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
        return {kind: bundle.size for kind, bundle in self.bundles.items()}

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
        heads = shape["kv"] * shape["query"]
        attention = 12 * self.num_layers * heads * self.head_dim * seq_len / 2
        return 6 * matrices + attention
