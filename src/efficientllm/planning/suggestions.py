"""Suggestions: the flags with which a run that does not fit its GPUs would, and what it would take with them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from efficientllm.config.run_config import CHECKPOINTING, RunConfig
from efficientllm.planning.cluster_costs import Setup, make_setup, step_cost
from efficientllm.planning.gpus import MACHINE, Cluster
from efficientllm.space.dims import Shape, Space
from efficientllm.training.memory_estimate import divisors

MOST_GPUS, LEAST_SEQ_LEN = 1024, 256  # how far suggestions go
NEAR = 4  # times as many GPUs are still worth naming where fewer would do with other flags
GAIN = 0.95  # of the time is what one more flag has to save

Change = tuple[str, dict[str, Any]]  # flags, and the fields that they set
KEEP: Change = ("", {})


@dataclass(frozen=True)
class Suggestion:
    """Flags to add or change, the run with them, and what it would cost.

    Attributes:
        seconds: of a step at the source's shape.
    """

    flags: tuple[str, ...]
    config: RunConfig
    cluster: Cluster
    setup: Setup
    seconds: float

    @property
    def num_flags(self) -> int:
        """How many flags it takes."""
        return sum(text.count("--") for text in self.flags)


def suggest(
    config: RunConfig, cluster: Cluster, space: Space, shape: Shape, teacher: Space | None = None
) -> list[Suggestion]:
    """Returns the ways in which a run would fit that does not, fastest first; if none does, that of the least peak.

    On as many GPUs, or the fewest on which flags are enough: the fastest way, and those that take fewer flags. What
    changes the numbers of the run (bf16, shorter rows) comes in only where nothing else helps. Last, a few more GPUs on
    which no other flag is needed. Nothing if the run fits as it is.
    """
    (given,) = every_way(config, cluster, space, shape, teacher, [])
    if given.setup.fits:
        return []
    tried, most_gpus = [given], MOST_GPUS
    found: list[Suggestion] = []
    for num_gpus in gpu_counts(config, cluster.num_gpus):
        if num_gpus > most_gpus:
            break
        here = num_gpus == cluster.num_gpus
        larger, gpus = replace(cluster, num_gpus=num_gpus), [KEEP if here else (f"--gpus {num_gpus}", {})]
        shared = sharing(config, larger)
        if not here:
            alone = every_way(config, larger, space, shape, teacher, [gpus, shared if num_gpus > MACHINE else [KEEP]])
            tried += alone
            if fitting := best(alone):
                return [*found, fitting[0]]
        for altered in () if found else altering(config, larger, shorten=here):
            kinds = [gpus, [altered], shared, recomputing(config), splitting(config)]
            ways = every_way(config, larger, space, shape, teacher, kinds)
            tried += ways
            if found := best(ways):
                most_gpus = NEAR * num_gpus
                break
    return found or [min(tried, key=lambda each: each.setup.memory.peak)]


def every_way(
    config: RunConfig,
    cluster: Cluster,
    space: Space,
    shape: Shape,
    teacher: Space | None,
    kinds: Iterable[list[Change]],
) -> list[Suggestion]:
    """Returns the run with every choice of one change of each kind, whether it fits or not."""
    ways = []
    for chosen in product(*kinds):
        changed = replace(config, **{name: value for _, fields in chosen for name, value in fields.items()})
        setup = make_setup(changed, cluster, space, shape, teacher=teacher)
        seconds = step_cost(changed, cluster, setup, space, shape).seconds
        ways.append(Suggestion(tuple(text for text, _ in chosen if text), changed, cluster, setup, seconds))
    return ways


def best(ways: Iterable[Suggestion]) -> list[Suggestion]:
    """Returns those that fit and for which no other is as fast with as few flags, fastest first."""
    kept: list[Suggestion] = []
    fitting = sorted((way for way in ways if way.setup.fits), key=lambda way: (way.num_flags, way.seconds))
    for way in fitting:
        if not kept or way.seconds < GAIN * kept[-1].seconds:
            kept.append(way)
    return kept[::-1]


def gpu_counts(config: RunConfig, num_gpus: int) -> list[int]:
    """Returns the number of GPUs and its doublings that can share the rows of a batch."""
    rows = config.batch_tokens // config.seq_len
    counts = [num_gpus << power for power in range(MOST_GPUS.bit_length())]
    return [count for count in counts if count == num_gpus or (count <= MOST_GPUS and rows % count == 0)]


def altering(config: RunConfig, cluster: Cluster, shorten: bool) -> list[Change]:
    """Returns the changes of what is computed, mildest first: none, bf16, and with `shorten` rows of fewer tokens."""
    narrow = config.precision == "float32" and "bf16" in cluster.gpu.precisions
    bf16: Change = ("--precision bf16", {"precision": "bf16"}) if narrow else KEEP
    changes = [KEEP, bf16] if narrow else [KEEP]
    for power in range(1, config.seq_len.bit_length()) if shorten else ():
        length = config.seq_len >> power
        if length >= LEAST_SEQ_LEN and config.batch_tokens % length == 0:
            changes.append((f"{bf16[0]} --seq-len {length}".strip(), {**bf16[1], "seq_len": length}))
    return changes


def sharing(config: RunConfig, cluster: Cluster) -> list[Change]:
    """Returns the ways to share a copy of the model among more GPUs, fewest first."""
    sharded = config.engine == "fsdp" or config.shards is not None
    fsdp: Change = KEEP if sharded else ("--engine fsdp", {"engine": "fsdp"})
    sizes = [size for size in sorted(divisors(cluster.num_gpus)) if size > (config.shards or cluster.machine)]
    named = fsdp if config.engine == "ddp" else KEEP  # else --shards alone says so
    shards = [(f"{named[0]} --shards {size}".strip(), {**named[1], "shards": size}) for size in sizes]
    return [KEEP] if cluster.num_gpus == 1 else [KEEP, *([] if sharded else [fsdp]), *shards]


def recomputing(config: RunConfig) -> list[Change]:
    """Returns the ways to save less for the backward pass, mildest first."""
    less = CHECKPOINTING[CHECKPOINTING.index(config.activation_checkpointing or "none") + 1 :]
    return [KEEP, *((f"--activation-checkpointing {how}", {"activation_checkpointing": how}) for how in less)]


def splitting(config: RunConfig) -> list[Change]:
    """Returns the smaller passes than those asked for, largest first."""
    sizes = sorted(divisors(config.micro_batch_size or 1), reverse=True)[1:]
    return [KEEP, *((f"--micro-batch-size {size}", {"micro_batch_size": size}) for size in sizes)]
