"""Peak training memory, estimated from a shape, and the largest micro-batch that fits.

    d  hidden size      a  query columns (heads · head size)      k  key columns      f  feed-forward width

A layer saves for the backward pass, per token: 6d in float32 (two norms: what goes in, normed, and scaled), and in the
activations' dtype 2a + 2k (query, key, value, attention's result) and 4f (gate, its activation, up, their product).
"""

from dataclasses import dataclass, fields
from math import isqrt

from efficientllm.space.dims import Shape, Space

FLOAT32 = 4  # bytes
ROW_CAP = 8192  # rows that pruning/activations.py keeps of an input, or twice its in-channels
CPU_TOKENS = 16_384  # tokens of a micro-batch from which a CPU gains no more speed
MEMORY_SHARE = 0.8  # the rest is for the allocator, the libraries and the data feed


@dataclass(frozen=True)
class Memory:
    """Bytes of a training run at one shape; what lives at once adds up to `peak`.

    Attributes:
        casts: the weights in the activations' dtype, which autocast keeps for a pass.
        activations: what one micro-batch saves for the backward pass, without the logits.
        logits: of one micro-batch: logits, their log-softmax and two gradients of them, over the whole vocabulary.
        fisher: the squared micro-batch gradients.
        samples: layer inputs kept for the second-order update.
        solve: Hessian, its factor and the widest layer's weights while one layer is updated, when activations are gone.
    """

    weights: int
    gradients: int
    moments: int
    casts: int
    activations: int
    logits: int
    fisher: int = 0
    samples: int = 0
    solve: int = 0

    @property
    def second_order(self) -> int:
        """Bytes that the second-order update uses."""
        return self.samples + self.solve

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: in a backward pass, or while the second-order update solves."""
        lasting = self.weights + self.gradients + self.moments + self.fisher + self.samples
        return lasting + max(self.casts + self.activations + self.logits, self.solve)

    def parts(self) -> dict[str, int]:
        """Returns the parts that are not empty, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name)}


def estimate(
    space: Space,
    shape: Shape,
    *,
    micro_batch_size: int,
    seq_len: int,
    batch_rows: int | None = None,
    weight_bytes: int = FLOAT32,
    activation_bytes: int = FLOAT32,
    compensate: bool = False,
    fisher: bool = False,
    activation_checkpointing: bool = False,
) -> Memory:
    """Returns the memory of training a model of `space` at `shape` with AdamW.

    Weights, gradients and moments are exact; activations are those of a gated decoder layer, within a tenth or so.

    Args:
        micro_batch_size: rows of a forward pass, each of `seq_len` tokens.
        batch_rows: rows of an optimizer step, which the second-order update samples from (default: one micro-batch).
        weight_bytes, activation_bytes: bytes of a number; autocast to bfloat16 is (4, 2).
        fisher: whether squared micro-batch gradients are gathered.
    """
    params = space.num_params(shape)
    tokens = micro_batch_size * seq_len
    hidden = shape["hidden"]
    inputs = in_channels(space, shape)
    layer = FLOAT32 * 6 * hidden + activation_bytes * (
        2 * inputs["query"] + 2 * shape["kv"] * space.head_dim + 4 * shape["ffn"]
    )
    mixed = activation_bytes < weight_bytes
    if mixed:
        layer += activation_bytes * 2 * hidden  # the norms' results, cast for the products
    saved = layer * space.num_layers
    if activation_checkpointing:
        saved = FLOAT32 * hidden * space.num_layers + layer  # what enters each layer, and one layer computed again
    samples = solve = 0
    if compensate:
        rows = (batch_rows or micro_batch_size) * seq_len
        sampled = {kind: min(rows, row_cap(width)) * width for kind, width in inputs.items()}
        # attention and feed-forward each read the stem through a norm of their own
        samples = activation_bytes * space.num_layers * (2 * sampled["hidden"] + sampled["query"] + sampled["ffn"])
        solve = FLOAT32 * max(
            sampled[kind]
            + 2 * width**2
            + 3 * width * (max(shape["ffn"], inputs["query"]) if kind == "hidden" else hidden)
            for kind, width in inputs.items()
        )
    return Memory(
        weights=weight_bytes * params,
        gradients=weight_bytes * params,
        moments=2 * weight_bytes * params,
        casts=activation_bytes * params if mixed else 0,
        activations=tokens * (saved + FLOAT32 * 3 * hidden),  # the last norm as any other
        logits=tokens * space.vocab_size * (activation_bytes + 3 * FLOAT32),
        fisher=FLOAT32 * params if fisher else 0,
        samples=samples,
        solve=solve,
    )


def in_channels(space: Space, shape: Shape) -> dict[str, int]:
    """Returns the in-channels of the products that read each kind of input."""
    return {
        "hidden": shape["hidden"],
        "query": shape["kv"] * shape["query"] * space.head_dim,
        "ffn": shape["ffn"],
    }


def row_cap(width: int) -> int:
    """Returns the most rows that the second-order update keeps of an input with `width` channels."""
    return max(ROW_CAP, 2 * width)


def fitting_micro_batch(
    space: Space,
    shape: Shape,
    *,
    rows: int,
    seq_len: int,
    memory_bytes: int,
    most_tokens: int | None = CPU_TOKENS,
    share: float = MEMORY_SHARE,
    weight_bytes: int = FLOAT32,
    activation_bytes: int = FLOAT32,
    compensate: bool = False,
    fisher: bool = False,
    activation_checkpointing: bool = False,
) -> int:
    """Returns the rows of a forward pass: the largest divisor of `rows` whose peak fits in `share` of the memory.

    At least 1, whether that fits or not; `most_tokens` bounds the tokens of a pass (None: memory alone does).
    """
    for size in sorted(divisors(rows), reverse=True):
        if most_tokens is not None and size * seq_len > most_tokens:
            continue
        memory = estimate(
            space,
            shape,
            micro_batch_size=size,
            seq_len=seq_len,
            batch_rows=rows,
            weight_bytes=weight_bytes,
            activation_bytes=activation_bytes,
            compensate=compensate,
            fisher=fisher,
            activation_checkpointing=activation_checkpointing,
        )
        if memory.peak <= share * memory_bytes:
            return size
    return 1


def divisors(number: int) -> set[int]:
    """Returns the divisors of a positive whole number."""
    return {each for low in range(1, isqrt(number) + 1) if number % low == 0 for each in (low, number // low)}
