"""Activation checkpointing: the same bits, the same products once more or not at all, and the memory that is told."""

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from efficientllm.config.run_config import CHECKPOINTING, from_dict
from efficientllm.distributed.device import default_checkpointing
from efficientllm.distributed.engine import Engine
from efficientllm.errors import ConfigError
from efficientllm.space import find_space
from efficientllm.training import recompute
from efficientllm.training.memory_estimate import PRECISIONS
from efficientllm.training.recompute import PRODUCTS, checkpoint_
from helpers.families import NAMES, batch, make_model
from helpers.memory import memory_of

CPU = torch.device("cpu")
WIDE = {"hidden_size": 120, "intermediate_size": 360}


class Products(TorchDispatchMode):
    """Counts the products and attentions that are computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in PRODUCTS
        return func(*args, **(kwargs or {}))


def gradients(name: str, how: str, half: bool) -> tuple[int, list[torch.Tensor]]:
    """Products computed in a forward and a backward pass, and the loss and all gradients."""
    model = make_model(name, dtype=torch.float32)
    checkpoint_(model, how)
    tokens = batch(length=16)
    with Products() as counter:
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
    return counter.count, [loss.detach(), *(param.grad for param in model.parameters())]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_and_selective_computes_no_product_twice(name: str, half: bool) -> None:
    plain, selective, full = (gradients(name, how, half) for how in CHECKPOINTING)
    assert plain[0] == selective[0] < full[0]
    for _, found in (selective, full):
        assert all(map(torch.equal, found, plain[1]))


def kept_bytes(layers: int, how: str, precision: Any) -> int:
    """Bytes that stand after a forward pass and did not before."""
    model = make_model("llama", dtype=torch.float32, num_hidden_layers=layers, **WIDE)
    checkpoint_(model, how)
    engine = Engine(CPU, precision)
    model = engine.wrap(model)
    tokens = batch(rows=16, length=64)

    def run() -> torch.Tensor:
        with engine.autocast():
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    run()  # makes what lasts
    gc.collect()  # garbage of an earlier measurement that is freed in this one would count as less kept
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched,
        record_function("pass"),
    ):
        loss = run()
    assert loss.requires_grad and watched.profiler is not None and watched.profiler.kineto_results is not None
    events = watched.profiler.kineto_results.events()
    (span,) = [event for event in events if event.name() == "pass"]
    inside = [event for event in events if span.start_ns() <= event.start_ns() <= span.end_ns()]
    return sum(event.nbytes() for event in inside if event.name() == "[memory]")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("how", CHECKPOINTING)
def test_a_pass_keeps_what_is_estimated(how: str, precision: str) -> None:
    spaces = [find_space(make_model("llama", num_hidden_layers=layers, **WIDE)) for layers in (2, 6)]
    way: dict[str, Any] = {"activation_bytes": PRECISIONS[precision], "activation_checkpointing": how}
    few, many = (memory_of(space, space.shape, micro_batch_size=16, seq_len=64, **way) for space in spaces)
    # a cast weight is saved with the products that take it, and made again where those are computed again
    wanted = many.activations - few.activations + (many.casts - few.casts if how == "none" else 0)
    assert kept_bytes(6, how, precision) - kept_bytes(2, how, precision) == pytest.approx(wanted, rel=0.05)


def test_a_pass_without_gradients_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make_model("llama"), []
    expected = model(input_ids=batch(), use_cache=False).logits
    checkpoint_(model, "selective")
    monkeypatch.setattr(recompute, "_policy", lambda context, op, *args, **kwargs: asked.append(op))
    with torch.no_grad():
        assert torch.equal(model(input_ids=batch(), use_cache=False).logits, expected)
    assert not asked
    model(input_ids=batch(), use_cache=False)
    assert asked  # control: with gradients


def test_large_sources_compute_again_on_a_cpu_and_what_yaml_says_otherwise() -> None:
    assert default_checkpointing(CPU, 135_000_000, "float32", False) == "selective"
    others = [(CPU, 600_000, "float32", False), (CPU, 135_000_000, "bf16", False), (CPU, 135_000_000, "float32", True)]
    others.append((torch.device("cuda"), 135_000_000, "float32", False))
    assert {default_checkpointing(*each) for each in others} == {"none"}
    told = [from_dict({"activation-checkpointing": value}).activation_checkpointing for value in (True, False, "none")]
    assert told == ["full", None, "none"]  # the flag without a value, and no flag
    with pytest.raises(ConfigError, match="is not a single string"):
        from_dict({"method": True})
