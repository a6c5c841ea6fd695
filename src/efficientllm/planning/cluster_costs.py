"""Costs of a run on a cluster: time, traffic and memory, by estimate.

    P  parameters      n  GPUs      s  shards of one copy (fsdp)      m  micro-batches of a step on one GPU
    c  bytes of a number in the products (2 in bf16)      R, L  parameters of FSDP's root group, of its layers

Bytes that a GPU sends in a step, by ring algorithms (a ring of n sends (n-1)/n of a tensor to gather or reduce it):

    ddp     2 (n-1)/n · 4P                               gradients, float32, once a step
    fsdp    (s-1)/s · m·(c·(R + 2L) + 4P)                of every micro-batch: weights, forward and backward; gradients
            + (s-1)/s · m·c·L of a teacher               its layers' weights, forward alone
            + 2 (n/s-1)/(n/s) · 4P/s                     gradients among the n/s copies (hybrid sharding), once a step
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from efficientllm.config.run_config import RunConfig
from efficientllm.errors import ConfigError
from efficientllm.planning.gpus import Cluster
from efficientllm.space.dims import Shape, Space
from efficientllm.training.memory_estimate import (
    FLOAT32,
    MEMORY_SHARE,
    PRECISIONS,
    Memory,
    PassSetup,
    default_engine,
    estimate,
    fitting_micro_batch,
    frozen_bytes,
    fsdp_groups,
)
from efficientllm.training.recipe import rank_rows
from efficientllm.training.teacher import pass_flops

RECOMPUTED = 4 / 3  # full activation checkpointing computes the forward pass, a third of the FLOPs, once more


@dataclass(frozen=True)
class Setup:
    """How each GPU of a cluster trains.

    Attributes:
        shards: GPUs that share one copy.
        rows, micro_batch_size: of an optimizer step, and of a pass, on one GPU.
        memory: at the source's shape.
        fits: whether the peak stays within 0.8 of the gpu's memory.
        teacher: the space of `--distill`'s.
    """

    engine: str
    precision: str
    shards: int
    rows: int
    micro_batch_size: int
    memory: Memory
    fits: bool
    teacher: Space | None = None


@dataclass(frozen=True)
class Step:
    """One optimizer step: seconds of compute, bytes that a GPU sends, and seconds of sending them."""

    compute: float
    sent: float
    sending: float

    @property
    def seconds(self) -> float:
        """Seconds of the step, as if compute and communication overlapped fully."""
        return max(self.compute, self.sending)


def make_setup(
    config: RunConfig,
    cluster: Cluster,
    space: Space,
    shape: Shape,
    *,
    engine: str | None = None,
    precision: str | None = None,
    teacher: Space | None = None,
) -> Setup:
    """Returns how `prune` would train on the cluster; `engine` and `precision` override its choice.

    Raises:
        ConfigError: if the GPUs cannot share the rows of a batch, cannot be cut into replicas of `--shards`, or are not
            known to compute in `--precision`.
    """
    num_gpus, gpu = cluster.num_gpus, cluster.gpu
    if config.shards and num_gpus % config.shards:
        raise ConfigError(f"--shards {config.shards} does not divide --gpus {num_gpus}; change one of them")
    if precision is None:
        precision = config.precision or gpu.precisions[-1]
        if math.isnan(gpu.peak(precision)):
            raise ConfigError(
                f"--precision {precision}: the FLOP/s of {gpu.name} in {precision} are not known; "
                "use the other precision or another --gpu"
            )
    rows = rank_rows(config, num_gpus)
    if num_gpus == 1:
        engine = "one"
    elif engine is None:
        frozen = frozen_bytes(teacher, PRECISIONS[precision])
        by_size = default_engine(space.num_params(shape), gpu.memory, frozen)
        engine = config.engine or ("fsdp" if config.shards else by_size)
    shards = (config.shards or cluster.machine) if engine == "fsdp" else 1
    a_pass = PassSetup.of_run(
        config,
        precision,
        activation_checkpointing=config.activation_checkpointing or "none",
        engine=engine,
        shards=shards,
        teacher=teacher,
        device="cuda",
    )
    if config.micro_batch_size:
        micro_batch_size = math.gcd(config.micro_batch_size, rows)
    else:
        micro_batch_size = fitting_micro_batch(space, shape, a_pass, rows=rows, memory_bytes=gpu.memory)
    memory = estimate(space, shape, a_pass, micro_batch_size=micro_batch_size, batch_rows=rows)
    fits = memory.peak <= MEMORY_SHARE * gpu.memory
    return Setup(engine, precision, shards, rows, micro_batch_size, memory, fits, teacher)


def step_cost(config: RunConfig, cluster: Cluster, setup: Setup, space: Space, shape: Shape) -> Step:
    """Returns the time and traffic of one optimizer step; nan seconds where the gpu's FLOP/s are not known."""
    compute = config.batch_tokens * space.flops_per_token(shape, config.seq_len)
    if config.activation_checkpointing == "full":
        compute *= RECOMPUTED
    compute += config.batch_tokens * pass_flops(setup.teacher, config.seq_len)
    sent = traffic(space, shape, setup, cluster.num_gpus)
    # replicas of machines meet over the network; what stays within a copy does not
    sending = sum(size / cluster.bandwidth(ring) for ring, size in sent.items())
    return Step(
        compute / (cluster.num_gpus * cluster.mfu * cluster.gpu.peak(setup.precision)), sum(sent.values()), sending
    )


def traffic(space: Space, shape: Shape, setup: Setup, num_gpus: int) -> dict[int, float]:
    """Returns the bytes that each GPU sends in a step, by the number of GPUs that its ring spans."""
    params, shards = space.num_params(shape), setup.shards
    gradients = FLOAT32 * params
    if setup.engine == "one":
        return {}
    if setup.engine == "ddp":
        return {num_gpus: 2 * _ring(num_gpus) * gradients}
    root, layer = fsdp_groups(space, shape)
    passes = setup.rows // setup.micro_batch_size
    weights = PRECISIONS[setup.precision] * (root + 2 * layer * space.num_layers)
    if setup.teacher is not None:
        _, teacher_layer = fsdp_groups(setup.teacher, setup.teacher.shape)
        weights += PRECISIONS[setup.precision] * teacher_layer * setup.teacher.num_layers
    sent = {shards: _ring(shards) * passes * (weights + gradients)}
    if shards < num_gpus:
        sent[num_gpus] = 2 * _ring(num_gpus // shards) * gradients / shards
    return sent


def phase_seconds(
    config: RunConfig, cluster: Cluster, setup: Setup, space: Space, shapes: Iterable[tuple[Shape, int]]
) -> float:
    """Returns the seconds of a phase that computes each shape for its number of steps."""
    return sum(step_cost(config, cluster, setup, space, shape).seconds * steps for shape, steps in shapes)


def _ring(size: int) -> float:
    return (size - 1) / size
