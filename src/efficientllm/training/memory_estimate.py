"""Peak training memory of one process, estimated from a shape, and the largest micro-batch that fits.

    d  hidden size      a  query columns (heads · head size)      k  key columns      f  feed-forward width

A layer saves for the backward pass, per token: 2d in float32 (what goes into two norms), and in the activations'
dtype 4d (normed, and scaled), 2a + 2k (query, key, value, attention's result) and 4f (gate, its activation, up, their
product).

Weights, gradients and moments are float32 always: 16 bytes a parameter, whole, or under FSDP a part on each rank.
"""

from dataclasses import dataclass, fields
from math import ceil, isqrt
from typing import Any

from efficientllm.config.methods import METHODS
from efficientllm.config.run_config import RunConfig
from efficientllm.space.dims import Shape, Space, in_layer
from efficientllm.training.cross_entropy import chunk_rows

FLOAT32 = 4  # bytes
PRECISIONS = {"float32": FLOAT32, "bf16": 2}  # bytes of a number in the products
ROW_CAP = 8192  # rows that pruning/activations.py keeps of an input, or twice its in-channels
CPU_TOKENS = 16_384  # tokens of a micro-batch from which a CPU gains no more speed
MEMORY_SHARE = 0.8  # the rest is for the allocator, the libraries and the data loader


@dataclass(frozen=True)
class Memory:
    """Bytes of a training run at one shape; what lives at once adds up to `peak`.

    Attributes:
        buckets: where DDP sums gradients, while those of several micro-batches add up beside it.
        casts: the weights in the activations' dtype, which autocast keeps for a pass.
        gathered: what FSDP holds whole for a pass: embedding, head, two layers, and gradients on their way.
        activations: what one micro-batch saves for the backward pass, without the logits.
        logits: of one chunk of the loss, which become their own gradient; and the gradients that all chunks add to, of
            the hidden states and of the head.
        teacher: weights of `--distill`, with what FSDP keeps whole of them, and the states that its head reads.
        teacher_pass: what one of its layers computes with, while the student has no activations yet.
        fisher: the squared micro-batch gradients.
        samples: layer inputs kept for the second-order update.
        solve: Hessian, its factor and the widest layer's weights while one layer is updated, when activations are gone.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int
    buckets: int = 0
    casts: int = 0
    gathered: int = 0
    teacher: int = 0
    teacher_pass: int = 0
    fisher: int = 0
    samples: int = 0
    solve: int = 0

    @property
    def states(self) -> int:
        """Bytes of weights, gradients and moments."""
        return self.weights + self.gradients + self.moments

    @property
    def second_order(self) -> int:
        """Bytes that the second-order update uses."""
        return self.samples + self.solve

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: in a backward pass, or while the second-order update solves."""
        lasting = self.states + self.buckets + self.teacher + self.fisher + self.samples
        passing = self.casts + self.gathered + self.activations + self.logits
        return lasting + max(passing, self.teacher_pass, self.solve)

    def parts(self) -> dict[str, int]:
        """Returns the parts that are not empty, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name)}


@dataclass(frozen=True, kw_only=True)
class PassSetup:
    """How a rank trains, as far as its memory depends on it.

    Attributes:
        seq_len: tokens of a row.
        compensate: whether layer inputs are kept for the second-order update.
        fisher: whether squared micro-batch gradients are gathered.
        activation_checkpointing: none, selective or full.
        weight_bytes, activation_bytes: bytes of a number; bf16 over float32 weights is (4, 2).
        engine: one, ddp or fsdp.
        shards: ranks that share one copy under fsdp.
        teacher: the space of `--distill`'s, at its own shape.
        device: cpu or cuda, which take different chunks of the loss.
    """

    seq_len: int
    compensate: bool = False
    fisher: bool = False
    activation_checkpointing: str = "none"
    weight_bytes: int = FLOAT32
    activation_bytes: int = FLOAT32
    engine: str = "one"
    shards: int = 1
    teacher: Space | None = None
    device: str = "cpu"

    @classmethod
    def of_run(cls, config: RunConfig, precision: str, **more: Any) -> "PassSetup":
        """Returns that of a run that computes in `precision`; `more`: the fields that its config does not decide."""
        return cls(
            seq_len=config.seq_len,
            compensate=config.compensate or METHODS[config.method].compensates,
            fisher=config.saliency == "taylor2",
            activation_bytes=PRECISIONS[precision],
            **more,
        )


def estimate(
    space: Space, shape: Shape, setup: PassSetup, *, micro_batch_size: int, batch_rows: int | None = None
) -> Memory:
    """Returns the memory of training a model of `space` at `shape` with AdamW, on one rank.

    Weights, gradients and moments are exact; activations are those of a gated decoder layer, within a tenth or so.

    Args:
        micro_batch_size: rows of a forward pass.
        batch_rows: this rank's rows of an optimizer step, which the second-order update samples from (default: one
            micro-batch).
    """
    weight_bytes, activation_bytes = setup.weight_bytes, setup.activation_bytes
    seq_len, teacher, again = setup.seq_len, setup.teacher, setup.activation_checkpointing
    params = space.num_params(shape)
    tokens = micro_batch_size * seq_len
    hidden = shape["hidden"]
    layers = [in_layer(shape, layer) for layer in range(space.num_layers)]
    inputs = [in_channels(space, sizes) for sizes in layers]
    mixed = activation_bytes < weight_bytes
    each = [layer_bytes(space, sizes, activation_bytes) for sizes in layers]
    saved = sum(each)
    if again != "none":
        # what enters each layer, and one layer computed again
        saved = activation_bytes * hidden * space.num_layers + max(each)
    if again == "selective":
        saved += sum(product_bytes(space, sizes, activation_bytes) for sizes in layers)
    rows = batch_rows or micro_batch_size
    samples = solve = 0
    if setup.compensate:
        for width in inputs:
            sampled = {kind: min(rows * seq_len, row_cap(size)) * size for kind, size in width.items()}
            # attention and feed-forward each read the stem through a norm of their own
            samples += activation_bytes * (2 * sampled["hidden"] + sampled["query"] + sampled["ffn"])
            widest = {"hidden": max(width["ffn"], width["query"]), "query": hidden, "ffn": hidden}
            parts = (sampled[kind] + 2 * size**2 + 3 * size * widest[kind] for kind, size in width.items())
            solve = max(solve, FLOAT32 * max(parts))
    sharded = setup.engine == "fsdp"
    held = ceil(weight_bytes * params / setup.shards) if sharded else weight_bytes * params
    accumulates = rows > micro_batch_size
    looked = teaching = 0
    if teacher is not None:
        looked = frozen_bytes(teacher, activation_bytes) // (setup.shards if sharded else 1)
        looked += activation_bytes * tokens * teacher.shape["hidden"]
        if sharded:  # the root group stays, and a layer is computed while the next one is gathered
            root, part = fsdp_groups(teacher, teacher.shape)
            looked += activation_bytes * (root + 2 * part)
        sizes = (in_layer(teacher.shape, layer) for layer in range(teacher.num_layers))
        teaching = tokens * max(layer_bytes(teacher, each, activation_bytes) for each in sizes)
    return Memory(
        weights=held,
        gradients=held,
        moments=2 * held,
        activations=tokens * (saved + norm_bytes(hidden, activation_bytes)),
        logits=logit_bytes(tokens, space.vocab_size, activation_bytes * mixed, teacher is not None, setup.device)
        + FLOAT32 * hidden * (tokens + space.vocab_size),
        buckets=weight_bytes * params if setup.engine == "ddp" and accumulates else 0,
        casts=activation_bytes * params if mixed and not sharded else 0,
        gathered=gathered_bytes(space, shape, activation_bytes) if sharded else 0,
        teacher=looked,
        teacher_pass=teaching,
        fisher=(held if sharded else FLOAT32 * params) if setup.fisher else 0,
        samples=samples,
        solve=solve,
    )


def layer_bytes(space: Space, shape: Shape, activation_bytes: int) -> int:
    """Returns the bytes of a token's activations in a decoder layer of that shape."""
    query, key = in_channels(space, shape)["query"], shape["kv"] * space.head_dim
    norms = 2 * norm_bytes(shape["hidden"], activation_bytes)
    return norms + activation_bytes * (2 * query + 2 * key + 4 * shape["ffn"])


def norm_bytes(hidden: int, activation_bytes: int) -> int:
    """Returns the bytes of a token in a norm: what goes in, in float32, normed and scaled."""
    return (FLOAT32 + 2 * activation_bytes) * hidden


def product_bytes(space: Space, shape: Shape, activation_bytes: int) -> int:
    """Returns the bytes of what a token's products and attention give in a decoder layer of that shape."""
    query, key = in_channels(space, shape)["query"], shape["kv"] * space.head_dim
    return activation_bytes * (2 * query + 2 * key + 2 * shape["hidden"] + 2 * shape["ffn"])


def logit_bytes(tokens: int, vocab_size: int, cast_bytes: int, taught: bool, device: str) -> int:
    """Returns the bytes of a chunk's logits, which become their own gradient, cast for the products if those are bf16.

    Taught by a teacher, half as many tokens have both models' logits and the logarithms of both distributions.
    """
    rows = chunk_rows(tokens, vocab_size, device, 2 if taught else 1)
    return rows * vocab_size * ((4 if taught else 1) * FLOAT32 + cast_bytes)


def gathered_bytes(space: Space, shape: Shape, compute_bytes: int) -> int:
    """Returns the bytes that FSDP holds whole in a backward pass beside its shards.

    The root group and its gradient stand to the end of the pass; a layer is computed while the next one is gathered
    and the gradient of the one before is summed over the ranks in float32.
    """
    root, layer = fsdp_groups(space, shape)
    return compute_bytes * (2 * root + 3 * layer) + FLOAT32 * layer


def fsdp_groups(space: Space, shape: Shape) -> tuple[int, int]:
    """Returns the parameters that FSDP gathers at once: of the root (embedding, last norm, head), and of one layer."""
    root = space.vocab_size * shape["hidden"] * (1 if space.tied else 2) + shape["hidden"]
    return root, (space.num_params(shape) - root) // space.num_layers


def frozen_bytes(teacher: Space | None, activation_bytes: int) -> int:
    """Returns the bytes of a teacher's weights, which are kept as products take them; 0 without one."""
    return activation_bytes * teacher.num_params(teacher.shape) if teacher else 0


def default_engine(params: int, memory_bytes: float, frozen: int = 0) -> str:
    """Returns how ranks share a model: FSDP where weights, gradients and moments fill more than half of the memory.

    Args:
        frozen: bytes of a teacher, which is shared in the same way.
    """
    return "fsdp" if 2 * (4 * FLOAT32 * params + frozen) > memory_bytes else "ddp"


def in_channels(space: Space, shape: Shape) -> dict[str, int]:
    """Returns the in-channels of the products of a layer, of that shape, that read each kind of input."""
    return {
        "hidden": shape["hidden"],
        "query": shape["kv"] * shape["query"] * space.head_dim,
        "ffn": shape["ffn"],
    }


def row_cap(width: int) -> int:
    """Returns the most rows that the second-order update keeps of an input with `width` channels."""
    return max(ROW_CAP, 2 * width)


def fitting_micro_batch(space: Space, shape: Shape, setup: PassSetup, *, rows: int, memory_bytes: float) -> int:
    """Returns the rows of a forward pass: the largest divisor of `rows` whose peak fits in 0.8 of the memory.

    At least 1, whether that fits or not; on a CPU of at most `CPU_TOKENS`.
    """
    for size in sorted(divisors(rows), reverse=True):
        if setup.device == "cpu" and size * setup.seq_len > CPU_TOKENS:
            continue
        memory = estimate(space, shape, setup, micro_batch_size=size, batch_rows=rows)
        if memory.peak <= MEMORY_SHARE * memory_bytes:
            return size
    return 1


def divisors(number: int) -> set[int]:
    """Returns the divisors of a positive whole number."""
    return {each for low in range(1, isqrt(number) + 1) if number % low == 0 for each in (low, number // low)}
