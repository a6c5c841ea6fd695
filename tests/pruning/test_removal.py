"""Retire and compact: what goes is gone, what stays is the stock model, and the training does not notice."""

import copy
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efficientllm.errors import UnsupportedModelError
from efficientllm.models.llama_mistral import relabel_llama_
from efficientllm.pruning.norms import LiveNorms
from efficientllm.pruning.removal import check_state, compact_, count_live_, entries, retire_
from efficientllm.space import Space, find_space
from helpers.families import (
    DIVIDED,
    EVERY,
    FAMILIES,
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    NAMES,
    batch,
    logits,
    loss_of,
    make_model,
    stock,
)

KINDS = ("hidden", "ffn", "kv", "query")
Units = dict[str, list[int]]


def pick(space: Space, kind: str, seed: int = 0, count: int = 1) -> Units:
    """Returns random units of every dim of a bundle."""
    draw = random.Random(f"{kind}{seed}")
    return {dim.name: draw.sample(range(dim.size), count) for dim in space.bundles[kind].dims}


def removable(heads: str) -> Iterable[str]:
    return KINDS if HEADS[heads][1] > 1 else KINDS[:3]


def retired(model: Any, units: Units, norms: LiveNorms | None = None, optimizer: Optimizer | None = None) -> Any:
    space = find_space(model)
    retire_(model, optimizer, space, units)
    if norms is not None:
        count_live_(model, norms, space, units)
    return model


def compacted(model: Any, units: Units, optimizer: Optimizer | None = None) -> Any:
    compact_(model, optimizer, space := find_space(model), units)
    gone = {kind for kind, bundle in space.bundles.items() if any(dim.name in units for dim in bundle.dims)}
    assert all((find_space(model).shape[kind] < size) == (kind in gone) for kind, size in space.shape.items())
    count_live_(model, LiveNorms(), find_space(model), {})
    return model


def without(model: Any, kind: str, units: Units) -> Any:
    """Zeroes, by the modules' own names, the columns that read the units: an oracle without the tables."""
    head_dim, group = model.config.head_dim, find_space(model).shape["query"]
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            if kind == "ffn":
                layer.mlp.down_proj.weight[:, units[f"layers.{number}.ffn"]] = 0
            else:
                kv = units.get(f"layers.{number}.kv", [])
                heads = [k * group + q for k in kv for q in range(group)]
                for g in range(find_space(model).shape["kv"]):
                    heads += [g * group + q for q in units.get(f"layers.{number}.query.{g}", [])]
                for head in heads:
                    layer.self_attn.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
    return model


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name, heads", EVERY)
def test_zeroed_equals_compacted(name: str, heads: str) -> None:
    for kind in removable(heads):
        units, others = (pick(find_space(make_model(name, heads)), kind, seed) for seed in (0, 1))
        assert units != others
        small = compacted(retired(make_model(name, heads), units), units)
        if kind == "hidden" or (FAMILIES[name].norms == "heads" and kind == "kv"):  # their norms count live entries
            zeroed = logits(retired(make_model(name, heads), units, LiveNorms()))
            assert (logits(retired(make_model(name, heads), units)) - zeroed).abs().max() > 1e-6
            other = logits(retired(make_model(name, heads), others, LiveNorms()))
        elif FAMILIES[name].norms == "heads" and kind == "query":
            continue  # removed at once; the norm over all heads leaves nothing to compare with but the stock model
        else:
            zeroed = logits(without(make_model(name, heads), kind, units))
            if kind != "query":  # what is left of a retired unit does nothing
                assert torch.equal(zeroed, logits(retired(without(make_model(name, heads), kind, units), units)))
            other = logits(without(make_model(name, heads), kind, others))
        torch.testing.assert_close(logits(small), zeroed, rtol=0, atol=1e-11)
        assert (logits(small) - other).abs().max() > 1e-4, "another unit does the same"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name, heads", EVERY)
def test_compacted_is_the_stock_model_of_its_config(name: str, heads: str) -> None:
    model = make_model(name, heads)
    relabel_llama_(model)  # a Mistral accepts every size
    for seed, kind in enumerate(removable(heads)):
        if FAMILIES[name].heads_divide_hidden and kind != "ffn":
            continue  # their configs accept no such size: next test
        compacted(model, pick(find_space(model), kind, seed))
    assert_stock(model)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", DIVIDED)
def test_compacted_is_the_stock_model_of_a_constrained_family(name: str) -> None:
    model = make_model(name)
    space = find_space(model)
    compacted(model, {**pick(space, "hidden", count=12), **pick(space, "kv"), **pick(space, "ffn", count=3)})
    assert_stock(model)
    compacted(model, pick(find_space(model), "query"))
    assert_stock(model)


def assert_stock(model: Any) -> None:
    """Weights, logits, gradients, and every number that a module keeps are those of the model built from the config."""
    other = stock(model.config)
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-12)
    for each in (model, other):
        each.zero_grad()
        loss_of(each, batch()).backward()
    for param, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param.grad, expected.grad, rtol=1e-9, atol=1e-12)
    for (path, module), expected in zip(model.named_modules(), other.modules(), strict=True):
        assert type(module).__name__.replace("Llama", "Mistral") == type(expected).__name__.replace("Llama", "Mistral")
        for key, value in vars(expected).items():
            if isinstance(value, int | float):
                assert getattr(module, key) == value, f"{path}.{key}"
        for key, buffer in expected.named_buffers(recurse=False):
            assert torch.equal(getattr(module, key), buffer), f"{path}.{key}"


@pytest.mark.usefixtures("float64")
def test_equal_widths_are_not_mixed_up() -> None:
    """Every width of this model is 24: hidden, FFN, K and V rows."""
    model = make_model("llama", intermediate_size=HIDDEN, num_key_value_heads=3, num_attention_heads=3)
    space = find_space(model)
    assert {param.shape for name, param in model.named_parameters() if "layers" in name} == {(24,), (24, 24)}
    compacted(model, pick(space, "ffn", count=5))
    assert (model.config.hidden_size, model.config.intermediate_size) == (24, 19)
    assert_stock(model)
    compacted(model, pick(find_space(model), "hidden", count=9))
    compacted(model, pick(find_space(model), "kv"))
    assert (model.config.hidden_size, model.config.intermediate_size, model.config.num_attention_heads) == (15, 19, 2)
    assert model.model.layers[0].mlp.hidden_size == 15 and model.model.layers[0].mlp.intermediate_size == 19


# --- retired units stay zero ----------------------------------------------------------------------------------------


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(model: Any, optimizer: Optimizer, steps: int, seed: int = 0, check: Callable[[], None] | None = None) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(100 * seed + step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if check:
            check()
        optimizer.step()


def parts(model: Any, units: Units) -> list[tuple[str, Tensor, Tensor | None]]:
    """Returns name, weights and gradients of every producer and consumer entry of some units."""
    params = dict(model.named_parameters())
    found = []
    for dim in find_space(model).dims():
        for slot in dim.slots if units.get(dim.name) else ():
            if slot.role != "rider":
                param = params[slot.param]
                index = torch.tensor(entries(slot.start, slot.block, units[dim.name]))
                grad = None if param.grad is None else param.grad.index_select(slot.axis, index)
                found.append((slot.param, param.index_select(slot.axis, index), grad))
    return found


@pytest.mark.parametrize("name, heads", EVERY)
def test_retired_units_stay_exactly_zero(name: str, heads: str) -> None:
    model = make_model(name, heads, dtype=torch.float32)
    optimizer, space = adamw(model), find_space(model)
    train(model, optimizer, 2)
    units = {**pick(space, "hidden", count=2), **pick(space, "ffn", count=2), **pick(space, "kv")}
    retired(model, units, LiveNorms(), optimizer)
    assert {key.rpartition(".")[2] for key, _, _ in parts(model, units)} >= {"weight"}
    before = {key: param.clone() for key, param in model.named_parameters()}

    def check() -> None:
        for key, weight, grad in parts(model, units):
            assert grad is not None and not grad.any(), f"gradient of {key}"
            assert not weight.any(), key

    train(model, optimizer, 4, seed=1, check=check)
    check()
    assert all(not torch.equal(before[key], param) for key, param in model.named_parameters()), "nothing was trained"


def test_a_bias_left_behind_would_wake_a_unit() -> None:
    """Negative control: the zeros hold because every producer is zero, biases included."""
    model = make_model("qwen2")
    units = pick(find_space(model), "kv")
    retired(model, units)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.v_proj.bias[entries(0, 8, units[f"layers.{number}.kv"])] = 0.1
    loss_of(model, batch()).backward()
    assert any(grad is not None and bool(grad.any()) for key, _, grad in parts(model, units) if "o_proj" in key)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_a_query_head_that_is_only_zeroed_wakes_up(name: str) -> None:
    """Negative control: why query heads are compacted at once."""
    model = make_model(name)
    optimizer, units = adamw(model), pick(find_space(model), "query")
    train(model, optimizer, 1)
    retired(model, units, LiveNorms(), optimizer)
    assert not any(weight.any() for _, weight, _ in parts(model, units))
    train(model, optimizer, 1, seed=1)
    assert any(weight.any() for _, weight, _ in parts(model, units))


# --- compaction -----------------------------------------------------------------------------------------------------


def waiting(name: str, heads: str, make: Callable[[nn.Module], Optimizer]) -> tuple[Any, Optimizer, LiveNorms, Units]:
    """Returns a trained model with pending units of every kind that may wait."""
    model = make_model(name, heads)
    optimizer, norms, space = make(model), LiveNorms(), find_space(model)
    train(model, optimizer, 3)
    units = {**pick(space, "hidden", count=3), **pick(space, "ffn", count=4), **pick(space, "kv")}
    retired(model, units, norms, optimizer)
    return model, optimizer, norms, units


def assert_compaction_changes_nothing(
    name: str, heads: str, make: Callable[[nn.Module], Optimizer], steps: int
) -> None:
    large, large_optimizer, _, units = waiting(name, heads, make)
    small, small_optimizer, norms, _ = waiting(name, heads, make)
    compact_(small, small_optimizer, find_space(small), units)
    count_live_(small, norms, find_space(small), {})
    torch.testing.assert_close(logits(small), logits(large), rtol=0, atol=1e-11)
    for model in (large, small):
        model.zero_grad()
        loss_of(model, batch(7)).backward()
    train(small, small_optimizer, steps, seed=1)
    gradients = {key: param.grad.clone() for key, param in small.named_parameters()}
    states = {key: copy.deepcopy(small_optimizer.state[param]) for key, param in small.named_parameters()}
    train(large, large_optimizer, steps, seed=1)
    compact_(large, large_optimizer, find_space(large), units)  # now slices what the other trained in its own shape
    for key, param in large.named_parameters():
        torch.testing.assert_close(param.data, dict(small.named_parameters())[key].data, rtol=0, atol=1e-8)
        torch.testing.assert_close(param.grad, gradients[key], rtol=0, atol=1e-8)
        for what, value in large_optimizer.state[param].items():
            torch.testing.assert_close(value, states[key][what], rtol=0, atol=1e-8)
    assert large_optimizer.param_groups[0]["params"] == list(large.parameters())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name, heads", EVERY)
def test_compaction_changes_neither_function_nor_the_next_30_steps(name: str, heads: str) -> None:
    steps = 30 if name in ("llama", "gemma2") else 6
    assert_compaction_changes_nothing(name, heads, adamw, steps)


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.parametrize("name, heads", EVERY)
def test_compaction_changes_no_30_steps_of_any_family(name: str, heads: str) -> None:
    assert_compaction_changes_nothing(name, heads, adamw, 30)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_gradients_are_the_same_after_compaction(name: str) -> None:
    large, _, _, units = waiting(name, "grouped", adamw)
    small, _, norms, _ = waiting(name, "grouped", adamw)
    compact_(small, None, find_space(small), units)
    count_live_(small, norms, find_space(small), {})
    for model in (large, small):
        model.zero_grad()
        loss_of(model, batch(7)).backward()
    compact_(large, None, find_space(large), units)
    for (key, param), other in zip(large.named_parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad, rtol=0, atol=1e-12, msg=key)


def test_an_old_graph_does_not_break_the_next_backward() -> None:
    model = make_model("llama")
    loss = loss_of(model, batch())
    loss.backward()
    units = pick(find_space(model), "ffn")
    compacted(retired(model, units), units)
    again = loss_of(model, batch(1))  # while `loss` and its graph are alive
    again.backward()
    assert loss.requires_grad and model.model.layers[0].mlp.down_proj.weight.grad.shape == (HIDDEN, FFN - 1)


@pytest.mark.parametrize("name", ["llama-tied", "gemma"])
def test_tied_weights_stay_one_tensor(name: str) -> None:
    model = make_model(name)
    optimizer = adamw(model)
    train(model, optimizer, 1)
    units = pick(find_space(model), "hidden", count=2)
    compacted(retired(model, units, None, optimizer), units, optimizer)
    embedding = model.model.embed_tokens.weight
    assert model.lm_head.weight is embedding and sum(p is embedding for p in optimizer.param_groups[0]["params"]) == 1
    train(model, optimizer, 1)
    assert model.lm_head.weight is embedding
    assert len(optimizer.state) == len(list(model.parameters())), "state of parameters that are gone"


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5, centered=True),
    "foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_of_the_parameters_shape_is_cut_along(kind: str) -> None:
    assert_compaction_changes_nothing("llama-tied", "grouped", OPTIMIZERS[kind], 5)


def test_parameter_groups_keep_their_settings() -> None:
    model = make_model("llama-bias")
    wide = [param for param in model.parameters() if param.ndim > 1]
    narrow = [param for param in model.parameters() if param.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}])
    train(model, optimizer, 1)
    compacted(model, pick(find_space(model), "hidden"), optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [param.ndim for param in optimizer.param_groups[0]["params"]] == [2] * len(wide)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert held == {id(param) for param in model.parameters()}
    step = optimizer.state[model.lm_head.weight]["step"]
    assert float(step) == 1


def test_state_of_another_shape_is_refused_before_anything_changes() -> None:
    model = make_model("llama")
    for optimizer in (torch.optim.Adafactor(model.parameters()), torch.optim.LBFGS(model.parameters())):

        def closure(optimizer: Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch())
            loss.backward()
            return loss

        optimizer.step(closure)
        before = {key: param.clone() for key, param in model.named_parameters()}
        with pytest.raises(UnsupportedModelError, match=rf"^{type(optimizer).__name__} keeps '\w+' .*AdamW"):
            check_state(optimizer)
        assert all(torch.equal(before[key], param) for key, param in model.named_parameters())
    optimizer = adamw(model)
    train(model, optimizer, 1)
    check_state(optimizer)  # control


def test_live_norms_come_off_again() -> None:
    model = make_model("gemma2")
    before = logits(model)
    norms, space = LiveNorms(), find_space(model)
    count_live_(model, norms, space, {"hidden": [1, 2, 3]})
    assert (logits(model) - before).abs().max() > 1e-4
    count_live_(model, norms, space, {"hidden": [1]})
    count_live_(model, norms, space, {})
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks for module in model.modules())
    assert len(model.model.layers) == LAYERS and len(NAMES) == 13
