"""Hours, traffic and memory on GPUs: against published runs, hand arithmetic and torch's own FSDP."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from efficientllm.cli import main
from efficientllm.config.run_config import RunConfig
from efficientllm.distributed.engine import Engine
from efficientllm.distributed.parallel import FSDP
from efficientllm.errors import ConfigError
from efficientllm.planning.cluster_costs import make_setup, phase_seconds, step_cost, traffic
from efficientllm.planning.gpus import GPUS, Cluster, GpuSpec, find_gpu, read_cluster
from efficientllm.planning.run_plan import make_plan
from efficientllm.planning.suggestions import GAIN, suggest
from efficientllm.space import Limits, Space, find_limits, find_space
from efficientllm.training.cross_entropy import CHUNK
from efficientllm.training.memory_estimate import CPU_TOKENS, default_engine, fsdp_groups
from efficientllm.training.recipe import make_recipe
from efficientllm.training.teacher import Teacher
from helpers.memory import memory_of

TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 130,
    "tie_word_embeddings": True,
}
# by hand: a layer holds q 48·48, k and v 24·48, o 48·48, three matrices 48·80 and two norms
LAYER = 2304 + 2 * 1152 + 2304 + 3 * 3840 + 2 * 48
ROOT = 130 * 48 + 48
PARAMS = ROOT + 3 * LAYER

# arXiv 2307.09288, tables 1 and 2: 2T tokens in rows of 4096, batches of 4M, and A100-80GB hours
LLAMA2 = {
    "7B": ((4096, 11008, 32, 32, 32), 184_320),
    "13B": ((5120, 13824, 40, 40, 40), 368_640),
    "70B": ((8192, 28672, 80, 64, 8), 1_720_320),
}


def space_of(**sizes: Any) -> tuple[Space, Limits]:
    config = LlamaConfig(**(TINY | sizes))
    with torch.device("meta"):
        space = find_space(LlamaForCausalLM(config))
    return space, find_limits(space, config)


def llama2(size: str) -> tuple[Space, Limits]:
    hidden, ffn, layers, heads, kv = LLAMA2[size][0]
    return space_of(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=128,
        vocab_size=32000,
        tie_word_embeddings=False,
    )


def toy_gpu(**numbers: float) -> GpuSpec:
    return replace(GpuSpec("toy", flops=1e12, float32_flops=1e11, memory=1e9, bandwidth=1e9), **numbers)


# Time


@pytest.mark.parametrize("size", LLAMA2)
def test_gpu_hours_are_those_of_published_runs(size: str) -> None:
    space, limits = llama2(size)
    config = RunConfig(
        target_params=space.num_params(space.shape), tokens=2 * 10**12, seq_len=4096, batch_tokens=2**22, prune_tokens=1
    )
    plan = make_plan(config, space, limits, make_recipe(config, space, limits))
    cluster = Cluster(512, GPUS["A100-80GB"])
    setup = make_setup(config, cluster, space, space.shape)
    hours = 512 * phase_seconds(config, cluster, setup, space, plan.training) / 3600
    assert plan.pruning == []
    assert hours == pytest.approx(LLAMA2[size][1], rel=0.15)  # at the assumed MFU of 0.4
    rough = 6 * plan.steps * 2**22 * space.num_params(space.shape) / (312e12 * 0.4) / 3600
    assert rough < hours < 1.15 * rough  # 6ND, and attention on top


def test_a_gpus_pass_has_the_rows_that_its_memory_allows() -> None:
    space, _ = space_of()
    config = RunConfig(seq_len=64, batch_tokens=2**20, engine="ddp")
    setup = make_setup(config, Cluster(1, toy_gpu()), space, space.shape)
    assert setup.micro_batch_size * 64 > CPU_TOKENS and setup.fits
    twice = make_setup(
        replace(config, micro_batch_size=2 * setup.micro_batch_size), Cluster(1, toy_gpu()), space, space.shape
    )
    assert not twice.fits or 2 * setup.micro_batch_size > setup.rows


def test_a_step_by_hand() -> None:
    space, _ = space_of()
    config = RunConfig(seq_len=64, batch_tokens=1024, micro_batch_size=2, engine="ddp")
    cluster = Cluster(4, toy_gpu(), mfu=0.5)
    setup = make_setup(config, cluster, space, space.shape)
    step = step_cost(config, cluster, setup, space, space.shape)
    flops = 1024 * (6 * PARAMS + 12 * 3 * 6 * 8 * 64 / 2)
    assert step.compute == pytest.approx(flops / (4 * 0.5 * 1e12))
    assert step.sent == pytest.approx(2 * 3 / 4 * 4 * PARAMS)
    assert step.sending == pytest.approx(step.sent / 1e9)
    again = replace(config, activation_checkpointing="full")
    assert step_cost(again, cluster, setup, space, space.shape).compute == pytest.approx(4 / 3 * step.compute)
    again = replace(config, activation_checkpointing="selective")  # no product twice
    assert step_cost(again, cluster, setup, space, space.shape).compute == step.compute


def test_traffic_by_hand() -> None:
    space, _ = space_of()
    config = RunConfig(seq_len=64, batch_tokens=1024, micro_batch_size=2, engine="fsdp")  # 16 rows
    four = make_setup(config, Cluster(4, toy_gpu()), space, space.shape)  # two passes of two rows
    weights = 2 * (ROOT + 2 * 3 * LAYER)  # bf16; layers are gathered again for the backward pass
    assert traffic(space, space.shape, four, 4) == {4: pytest.approx(3 / 4 * 2 * (weights + 4 * PARAMS))}
    hybrid = make_setup(replace(config, shards=2), Cluster(4, toy_gpu()), space, space.shape)
    assert traffic(space, space.shape, hybrid, 4) == {
        2: pytest.approx(1 / 2 * 2 * (weights + 4 * PARAMS)),
        4: pytest.approx(2 * 1 / 2 * 4 * PARAMS / 2),
    }
    one = make_setup(config, Cluster(1, toy_gpu()), space, space.shape)
    assert (one.engine, traffic(space, space.shape, one, 1)) == ("one", {})


def test_a_teacher_s_passes_by_hand() -> None:
    """A forward pass alone: 2 FLOPs a weight, where training has 6; its layers are gathered once a pass."""
    space, _ = space_of()
    config = RunConfig(
        seq_len=64, batch_tokens=1024, micro_batch_size=2, engine="fsdp", activation_checkpointing="full"
    )
    cluster = Cluster(4, toy_gpu(), mfu=0.5)
    alone, taught = (make_setup(config, cluster, space, space.shape, teacher=each) for each in (None, space))
    steps = [step_cost(config, cluster, setup, space, space.shape) for setup in (alone, taught)]
    flops = 1024 * (2 * PARAMS + 4 * 3 * 6 * 8 * 64 / 2)
    assert steps[1].compute - steps[0].compute == pytest.approx(flops / (4 * 0.5 * 1e12))
    assert steps[1].sent - steps[0].sent == pytest.approx(3 / 4 * 2 * 2 * 3 * LAYER)  # two passes of bf16 layers


def test_bandwidth_counts_where_it_bounds_and_nowhere_else() -> None:
    space, _ = space_of()
    config = RunConfig(seq_len=64, batch_tokens=1024, micro_batch_size=4, engine="ddp")

    def seconds(bandwidth: float) -> float:
        cluster = Cluster(4, toy_gpu(bandwidth=bandwidth))
        setup = make_setup(config, cluster, space, space.shape)
        return step_cost(config, cluster, setup, space, space.shape).seconds

    assert seconds(5e7) == pytest.approx(2 * seconds(1e8))  # bound by what is sent
    assert seconds(5e11) == seconds(1e12)  # by compute


def test_machines_meet_over_the_network() -> None:
    cluster = Cluster(16, toy_gpu(bandwidth=4e11), network=5e10)
    assert [cluster.bandwidth(ring) for ring in (2, 8, 16)] == [4e11, 4e11, 5e10]
    assert Cluster(16, toy_gpu(bandwidth=3e10), network=5e10).bandwidth(16) == 3e10
    assert [Cluster(number, toy_gpu()).machine for number in (1, 6, 12, 64)] == [1, 6, 6, 8]


# Memory


@pytest.mark.parametrize("tied", [True, False])
def test_the_groups_of_fsdp_are_those_of_the_model(tied: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(**(TINY | {"tie_word_embeddings": tied})))
    layers = {param for layer in model.model.layers for param in layer.parameters()}
    root = sum(param.numel() for param in model.parameters() if param not in layers)
    layer = sum(param.numel() for param in model.model.layers[1].parameters())
    space = find_space(model)
    assert fsdp_groups(space, space.shape) == (root, layer)
    assert layer == LAYER


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """The first of eight ranks, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("eight_ranks")
def test_fsdp_memory_is_what_torch_holds() -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**(TINY | {"vocab_size": 1024, "hidden_size": 96})))
    space = find_space(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (8,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    def memory(rows: int) -> Any:
        return memory_of(
            space,
            space.shape,
            micro_batch_size=1,
            seq_len=16,
            batch_rows=rows,
            activation_bytes=2,
            engine="fsdp",
            shards=8,
        )

    assert memory(1).weights == pytest.approx(sum(each.to_local().nbytes for each in model.parameters()), rel=0.02)
    tokens = torch.randint(0, 1024, (1, 16))
    for rows in (1, 2):  # what a second micro-batch adds goes to the same shards
        model.set_requires_all_reduce(rows == 2)
        model(input_ids=tokens, labels=tokens).loss.backward()
        groups = [module._get_fsdp_state()._fsdp_param_group for module in (model, *model.model.layers)]
        assert all(each.unsharded_accumulated_grad is None for group in groups for each in group.fsdp_params)
        sharded = sum(param.grad.to_local().nbytes for param in model.parameters())
        assert memory(rows).gradients == pytest.approx(sharded, rel=0.02)


@pytest.mark.filterwarnings("ignore:.broadcast_buffers.:FutureWarning")
@pytest.mark.usefixtures("one_rank")
def test_ddp_holds_its_sums_beside_those_of_several_micro_batches() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    space = find_space(model)
    replica = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    tokens = torch.randint(0, 130, (1, 16))

    def step(*, last: bool) -> dict[int, int]:
        with nullcontext() if last else replica.no_sync():
            replica(input_ids=tokens, labels=tokens).loss.backward()
        storages = [param.grad.untyped_storage() for param in model.parameters() if param.grad is not None]
        return {each.data_ptr(): each.nbytes() for each in storages}

    for _ in range(2):  # the first step orders the buckets anew
        buckets = step(last=True)
        replica.zero_grad(set_to_none=True)
    assert sum(buckets.values()) == pytest.approx(4 * PARAMS, rel=0.01)
    added = step(last=False)
    assert not added.keys() & buckets.keys() and sum(added.values()) == 4 * PARAMS
    memory = memory_of(space, space.shape, micro_batch_size=1, seq_len=16, batch_rows=2, engine="ddp")
    assert memory.gradients + memory.buckets == pytest.approx(sum(added.values()) + sum(buckets.values()), rel=0.01)
    replica.zero_grad(set_to_none=True)
    assert step(last=True).keys() <= buckets.keys()  # of one micro-batch nothing stands beside


def test_states_and_copies_by_hand() -> None:
    space, _ = space_of()

    def memory(**more: Any) -> Any:
        return memory_of(space, space.shape, micro_batch_size=2, seq_len=64, **more)

    assert memory().states == 16 * PARAMS
    ddp = memory(engine="ddp", activation_bytes=2)
    assert (ddp.states, ddp.buckets, ddp.casts, ddp.gathered) == (16 * PARAMS, 0, 2 * PARAMS, 0)
    assert memory(engine="ddp", batch_rows=4).buckets == 4 * PARAMS
    fsdp = memory(engine="fsdp", shards=4, activation_bytes=2)
    assert (fsdp.states, fsdp.buckets, fsdp.casts) == (16 * PARAMS / 4, 0, 0)
    # root and its gradient, two layers and a gradient in bf16, a gradient in float32
    assert fsdp.gathered == 2 * (2 * ROOT + 3 * LAYER) + 4 * LAYER
    assert memory(engine="fsdp", shards=4, activation_bytes=4).gathered == 4 * (2 * ROOT + 4 * LAYER)
    for each in (ddp, fsdp):
        assert each.peak == sum(each.parts().values())


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize("sharded", [True, False])
def test_a_teacher_s_memory_is_what_torch_holds(sharded: bool) -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**(TINY | {"vocab_size": 1024, "hidden_size": 96})))
    teacher = find_space(model)
    space, _ = space_of(vocab_size=1024)
    engine = FSDP(torch.device("cpu"), "bf16", shards=8) if sharded else Engine(torch.device("cpu"), "bf16")
    frozen = Teacher(model, RunConfig(), engine)
    way: dict[str, Any] = {"micro_batch_size": 1, "seq_len": 16, "activation_bytes": 2}
    way |= {"engine": engine.name, "shards": engine.shards}
    memory, plain = (memory_of(space, space.shape, **way, teacher=each) for each in (teacher, None))
    targets = frozen.targets(torch.randint(0, 1024, (1, 16)))
    held = sum(param.nbytes for param in frozen.model.parameters())
    if sharded:
        root, *layers = (
            each._get_fsdp_state()._fsdp_param_group for each in (frozen.model, *frozen.model.model.layers)
        )
        assert root.is_unsharded and not any(layer.is_unsharded for layer in layers)
        held = sum(param.sharded_param.to_local().nbytes for group in (root, *layers) for param in group.fsdp_params)
        held += sum(param.unsharded_param.nbytes for param in root.fsdp_params)
        held += 2 * sum(param._orig_size.numel() * 2 for param in layers[0].fsdp_params)  # computed, and on its way
    assert memory.teacher == pytest.approx(held + targets.states.nbytes, rel=0.02)
    assert memory.peak == plain.peak + memory.teacher + memory.logits - plain.logits
    assert memory.logits - plain.logits == 16 * 1024 * 3 * 4


def test_logits_are_those_of_a_chunk() -> None:
    space, _ = space_of()
    lengths = (512, 2**20, 2**22, 2**25)
    way: dict[str, Any] = {"micro_batch_size": 1, "device": "cuda"}
    short, least, eighth, most = (memory_of(space, space.shape, seq_len=n, **way).logits for n in lengths)
    assert short == 512 * 130 * 4 + 4 * 48 * (512 + 130)
    assert least == CHUNK // 130 * 130 * 4 + 4 * 48 * (2**20 + 130)
    assert eighth == 2**22 // 8 * 130 * 4 + 4 * 48 * (2**22 + 130)
    assert most == 4 * CHUNK // 130 * 130 * 4 + 4 * 48 * (2**25 + 130)
    cpu = memory_of(space, space.shape, seq_len=2**20, micro_batch_size=1, device="cpu").logits
    assert cpu == least == memory_of(space, space.shape, seq_len=2**25, micro_batch_size=1).logits - 4 * 48 * 31 * 2**20
    taught = memory_of(space, space.shape, seq_len=2**20, teacher=space, **way).logits
    assert taught == CHUNK // 2 // 130 * 130 * 4 * 4 + 4 * 48 * (2**20 + 130)  # both models', two distributions
    bf16 = memory_of(space, space.shape, micro_batch_size=1, seq_len=512, activation_bytes=2).logits
    assert bf16 - short == 512 * 130 * 2  # products come in bf16, their gradient goes in it


def test_the_engine_is_chosen_by_half_of_the_memory() -> None:
    assert default_engine(10**9, 32e9) == "ddp"
    assert default_engine(10**9 + 1, 32e9) == default_engine(10**9, 32e9, frozen=1) == "fsdp"
    space, _ = llama2("7B")
    config, cluster = RunConfig(), Cluster(8, GPUS["H100"])
    chosen = [
        make_setup(replace(config, **given), cluster, space, space.shape).engine
        for given in ({}, {"engine": "ddp"}, {"engine": "fsdp"})
    ]
    assert chosen == ["fsdp", "ddp", "fsdp"]
    small, _ = space_of()
    assert make_setup(config, cluster, small, small.shape).engine == "ddp"
    assert make_setup(replace(config, shards=4), cluster, small, small.shape).shards == 4


# What to change


WORDS = ("engine", "precision", "activation_checkpointing")  # flags that are no numbers


def with_flags(config: RunConfig, cluster: Cluster, flags: tuple[str, ...]) -> tuple[RunConfig, Cluster]:
    for words in (text.split() for text in " ".join(flags).split("--") if text):
        name, value = words[0].replace("-", "_"), words[1]
        if name == "gpus":
            cluster = replace(cluster, num_gpus=int(value))
        else:
            config = replace(config, **{name: value if name in WORDS else int(value)})
    return config, cluster


CASES = [
    ("7B", 8, "H100", {"engine": "ddp", "micro_batch_size": 8}),
    ("7B", 1, "H100", {}),
    ("7B", 8, "RTX-4090", {}),
    ("7B", 8, "A100-40GB", {"micro_batch_size": 4}),
    ("13B", 16, "H100", {"seq_len": 4096}),
    ("70B", 64, "H200", {"activation_checkpointing": "full"}),
    ("70B", 8, "L4", {}),
    ("7B", 2, "H100", {"compensate": True, "saliency": "taylor2"}),
    ("13B", 8, "H100", {"precision": "float32"}),
    ("7B", 8, "V100-32GB", {}),
]


@pytest.mark.parametrize(("size", "num_gpus", "gpu", "given"), CASES)
def test_what_is_suggested_fits(size: str, num_gpus: int, gpu: str, given: dict[str, Any]) -> None:
    space, _ = llama2(size)
    config, cluster = RunConfig(**given), Cluster(num_gpus, GPUS[gpu])
    asked = make_setup(config, cluster, space, space.shape)
    suggestions = suggest(config, cluster, space, space.shape)
    assert not asked.fits and suggestions
    for each in suggestions:
        changed = with_flags(config, cluster, each.flags)
        assert changed == (each.config, each.cluster)
        setup = make_setup(*changed, space, space.shape)
        assert setup.memory.peak == each.setup.memory.peak
        assert setup.fits == each.setup.fits == (setup.memory.peak <= 0.8 * GPUS[gpu].memory)
        assert each.seconds == step_cost(*changed, setup, space, space.shape).seconds
        if each.setup.fits:
            assert suggest(*changed, space, space.shape) == []
        else:
            assert len(suggestions) == 1 and setup.memory.peak <= asked.memory.peak
        for dropped in each.flags:  # none is there for nothing
            if each.setup.fits and not dropped.startswith("--gpus"):
                fewer = with_flags(config, cluster, tuple(flag for flag in each.flags if flag != dropped))
                setup = make_setup(*fewer, space, space.shape)
                assert not setup.fits or step_cost(*fewer, setup, space, space.shape).seconds > each.seconds / GAIN
    here = [each for each in suggestions if each.cluster == suggestions[0].cluster]
    assert all(one.seconds < GAIN * two.seconds and one.num_flags > two.num_flags for one, two in pairwise(here))


def test_a_faster_way_than_the_mildest_is_found() -> None:
    """Sharing over all machines alone would fit too, with the network for a bottleneck."""
    space, _ = llama2("70B")
    config, cluster = RunConfig(), Cluster(64, replace(GPUS["H100"], memory=140e9))
    first, *others = suggest(config, cluster, space, space.shape)
    mild = replace(config, shards=32)
    setup = make_setup(mild, cluster, space, space.shape)
    slow = step_cost(mild, cluster, setup, space, space.shape).seconds
    assert setup.fits and (first.num_flags, first.cluster) == (2, cluster)
    assert 1.5 * first.seconds < slow and [each.seconds for each in others if each.cluster == cluster] == [slow]


def test_what_changes_the_numbers_of_a_run_comes_last() -> None:
    space, _ = llama2("7B")
    config = RunConfig(precision="float32", seq_len=4096)
    for memory, words in ((32e9, set()), (28e9, {"--precision"}), (24e9, {"--precision", "--seq-len"})):
        cluster = Cluster(8, replace(GPUS["H100"], memory=memory))
        flags = " ".join(suggest(config, cluster, space, space.shape)[0].flags)
        assert {word for word in ("--precision", "--seq-len") if word in flags} == words
        assert "--activation-checkpointing full" in flags


def test_old_cards_train_in_float32() -> None:
    space, _ = space_of()
    setup = make_setup(RunConfig(), Cluster(1, GPUS["T4"]), space, space.shape)
    assert setup.precision == "float32"
    assert step_cost(RunConfig(), Cluster(1, GPUS["T4"]), setup, space, space.shape).compute > 0
    assert make_setup(RunConfig(precision="float32"), Cluster(1, GPUS["H100"]), space, space.shape).memory.casts == 0


def test_what_fits_needs_no_suggestion() -> None:
    space, _ = llama2("7B")
    assert suggest(RunConfig(), Cluster(8, GPUS["H200"]), space, space.shape) == []


# Cards and flags


def test_cards_are_found_as_people_write_them() -> None:
    for name in ("h100", "H100", "NVIDIA H100", "h-100"):
        assert find_gpu(name) is GPUS["H100"]
    for name in ("4090", "GeForce RTX 4090"):
        assert find_gpu(name) is GPUS["RTX-4090"]
    assert find_gpu("a100 80gb") is GPUS["A100-80GB"]


def test_dense_figures() -> None:
    """Against the data sheets' figures with 2:4 sparsity and both directions, which are twice as high."""
    sheets = {
        "H100": (1979, 900),
        "H100-PCIe": (1513, 128),
        "A100-80GB": (624, 600),
        "L4": (242, 64),
        "L40S": (733, 64),
    }
    for name, (flops, bandwidth) in sheets.items():
        gpu = GPUS[name]
        assert 2 * gpu.flops == pytest.approx(flops * 1e12, rel=0.02)
        assert 2 * gpu.bandwidth == bandwidth * 1e9
        assert gpu.float32_flops < gpu.flops


def test_flags_describe_another_card() -> None:
    assert read_cluster() is None
    cluster = read_cluster(gpus="4", flops="1300T", bandwidth="64G", gpu_memory="192G", mfu="0.3")
    assert cluster is not None
    gpu = cluster.gpu
    assert (gpu.flops, gpu.memory, gpu.bandwidth) == (1.3e15, 1.92e11, 6.4e10)
    assert (cluster.num_gpus, cluster.mfu, cluster.network) == (4, 0.3, 6.4e10)
    changed = read_cluster(gpu="H100", gpu_memory="94G")
    assert changed is not None and changed.num_gpus == 1
    assert changed.gpu == replace(GPUS["H100"], memory=94e9)
    assert read_cluster(flops="100T", gpu_memory="24G") is not None  # one GPU sends nothing


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--gpus 8 --gpu H10", ["--gpu H10", "did you mean H100 or H100-PCIe?", "B200", "--flops"]),
        ("--gpus 8 --gpu A100", ["did you mean A100-40GB or A100-80GB?"]),
        ("--gpus 1 --gpu H100 --shards 3", ["--shards 3", "--gpus 1"]),
        ("--gpus 8 --gpu V100-16GB --precision bf16", ["--precision bf16", "V100-16GB"]),
        ("--flops 100T --gpu-memory 24G --precision float32", ["--precision float32"]),
        ("--gpus 0 --gpu H100", ["--gpus 0", "below 1"]),
        ("--gpus eight --gpu H100", ["--gpus", "'eight'"]),
        ("--gpus 8", ["--gpu", "H100", "--flops"]),
        ("--flops 100T", ["--gpu-memory"]),
        ("--gpus 2 --flops 100T --gpu-memory 24G", ["--bandwidth"]),
        ("--gpu H100 --mfu 40", ["--mfu 40"]),
        ("--gpu H100 --mfu nan", ["--mfu nan"]),
        ("--gpus 3 --gpu H100", ["3 ranks", "--batch-tokens"]),
        ("--gpus 8 --gpu H100 --shards 3", ["--shards 3", "--gpus 8"]),
    ],
)
def test_a_mistake_about_gpus_is_one_line(
    flags: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--target-params", "50k", "--prune-tokens", "10M", *flags.split()]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and not printed.out
    for word in words:
        assert word in lines[0]


# What is printed


def section(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    printed = capsys.readouterr().out
    return printed[printed.index("\nEstimate for ") + 1 :]


def test_plan_prints_hours_memory_and_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 32000, "head_dim": 64}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    LlamaConfig(**(TINY | sizes), architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    run = [str(tmp_path), "--target-params", "20M", "--prune-tokens", "1B", "--tokens", "3B"]
    gpu = ["--flops", "100T", "--bandwidth", "10G", "--gpu-memory", "800M"]
    printed = section(capsys, *run, "--gpus", "2", *gpu)
    for word in (
        "pruning",
        "afterwards",
        "total",
        "GPU-hours",
        "source",
        "end",
        "bound by",
        "fsdp bf16",
        "ddp float32",
    ):
        assert word in printed
    assert "nor does any change" not in printed and "does not fit; it would with" in printed
    table = printed[printed.index("Memory per GPU") :]
    assert max(len(line.rstrip()) for line in printed.splitlines() if not line.startswith("note:")) <= 80
    assert table.count("…") == 0
    ways = [re.split(" {2,}", line.strip())[0] for line in printed.splitlines() if line.startswith("  --")]
    assert ways
    for way in ways:
        with_gpus = way.split() if "--gpus" in way else ["--gpus", "2", *way.split()]
        again = section(capsys, *run, *gpu, *with_gpus)
        assert "does not fit" not in again and "in bf16 fits" in again


def test_the_rows_of_a_batch_are_shared(capsys: pytest.CaptureFixture[str]) -> None:
    space, _ = space_of()
    config = RunConfig(seq_len=64, batch_tokens=64 * 12, micro_batch_size=4)
    setup = make_setup(config, Cluster(2, toy_gpu()), space, space.shape)
    assert (setup.rows, setup.micro_batch_size) == (6, 2)  # as the trainer: the largest size that divides both
    with pytest.raises(ConfigError, match="5 ranks"):
        make_setup(config, Cluster(5, toy_gpu()), space, space.shape)
