"""Layers that shrink each on its own: landing, what is left, the code that goes with the weights."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

import efficientllm
from efficientllm import Pruner
from efficientllm.delivery.huggingface import stock_model
from efficientllm.errors import UnsupportedModelError
from efficientllm.models.heterogeneous import PREFIX
from efficientllm.pruning import LinearPace, SlotPace
from efficientllm.pruning.landing import can_land, ffn_tile_size
from efficientllm.pruning.removal import compact_, resize_config, retire_
from efficientllm.pruning.selection import o_columns
from efficientllm.pruning.trajectory import proportional, simulate
from efficientllm.space import Limits, Space, find_limits, find_space
from efficientllm.space.dims import of_kind, widths
from helpers.edge import save
from helpers.families import (
    FAMILIES,
    LAYERS,
    NAMES,
    batch,
    differing,
    logits,
    make_config,
    make_model,
    meta_model,
    numel,
)
from helpers.landing import assert_lands
from helpers.loops import adamw, assert_same_models, loop, rows


def space_and_limits(model: Any, **flags: Any) -> tuple[Space, Limits]:
    space = find_space(model, per_layer=True)
    return space, find_limits(space, model.config, **{"min_ffn": 8, "min_hidden": 8, **flags})


def start(model: Any, share: float = 0.4, limits: Limits | None = None, **settings: Any) -> Pruner:
    """A Pruner whose target lies at a share of the way from the floors to the source."""
    space, found = space_and_limits(model)
    limits = limits or found
    most, least = space.num_params(limits.source), space.num_params(limits.floor)
    target = int(least + share * (most - least))
    settings = {"pace": LinearPace(30, 2), **settings}
    return Pruner(model, adamw(model), target, per_layer=True, limits=limits, **settings)


def is_differing(model: Any) -> bool:
    return bool(model.config.is_heterogeneous)


# --- landing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_lands_on_random_targets(round_to: int) -> None:
    draw, landed = random.Random(round_to), 0
    for name in ("llama", "qwen2", "gemma2"):
        config = make_config(name, intermediate_size=52, hidden_size=48, num_hidden_layers=3)
        space, limits = space_and_limits(meta_model(config), round_to=round_to, min_ffn=4)
        most, least = space.num_params(limits.source), space.num_params(limits.floor)
        for _ in range(12):
            targets = sorted((draw.randint(least, most - 1) for _ in range(draw.choice((1, 1, 2, 3)))), reverse=True)
            if can_land(limits.source, limits, space.num_params, *targets):
                assert_lands(space, limits, targets, draw)
                landed += len(targets)
    assert landed > 25


def test_lands_from_layers_that_differ() -> None:
    config = make_config("mistral", intermediate_size=52, **differing("mistral") | {"num_hidden_layers": 3})
    space, limits = space_and_limits(meta_model(config), round_to=4, min_ffn=4)
    draw = random.Random(0)
    most, least = space.num_params(limits.source), space.num_params(limits.floor)
    for target in [draw.randint(least, most - 1) for _ in range(8)]:
        assert_lands(space, limits, [target], draw)


def test_the_window_is_one_layers_tile() -> None:
    model = meta_model(make_config("llama"))
    (space, limits), uniform = space_and_limits(model), find_space(model)
    wide = find_limits(uniform, model.config)
    per_layer = ffn_tile_size(space.shape, limits, space.num_params)
    assert per_layer * LAYERS == ffn_tile_size(uniform.shape, wide, uniform.num_params) == 3 * 24 * LAYERS


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_uniform_space(name: str) -> None:
    model = meta_model(make_config(name))
    uniform, space = find_space(model), find_space(model, per_layer=True)
    assert {dim.name: dim for dim in space.dims()} == {dim.name: dim for dim in uniform.dims()}
    draw = random.Random(name)
    for _ in range(5):
        sizes = {kind: draw.randint(1, size) for kind, size in uniform.shape.items()}
        alike = {bundle: sizes[bundle.rpartition(".")[2]] for bundle in space.shape}
        assert space.num_params(alike) == uniform.num_params(sizes)
        assert space.flops_per_token(alike, 100) == uniform.flops_per_token(sizes, 100)
        assert widths(alike) == widths(sizes)
        for kind in sizes:  # a round over all layers waits as long as one removal in lockstep
            slots = [o_columns(bundle, alike, 8) for bundle in of_kind(alike, kind)]
            assert sum(slots) == pytest.approx(o_columns(kind, sizes, 8))


def test_a_plan_takes_all_layers_at_once_and_lands() -> None:
    space, limits = space_and_limits(meta_model(make_config("llama", num_hidden_layers=3)))
    target = space.num_params(limits.source) // 2
    planned = simulate(space.num_params, limits, [target], SlotPace(1), space.head_dim, proportional(limits))
    tile = ffn_tile_size(planned[-1].shape, limits, space.num_params)
    assert target - tile < planned[-1].size <= target
    units = sum(limits.source.values()) - sum(planned[-1].shape.values())
    assert sum(each.removals for each in planned) == units > 1.5 * len(planned)


# --- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_prunes_to_the_target(name: str, compensate: bool) -> None:
    pruner = start(make_model(name), compensate=compensate)
    target = pruner.target_params
    loop(pruner, 32)
    tile = ffn_tile_size(pruner.shape, pruner.limits, pruner.space.num_params)
    assert pruner.done and target - tile < pruner.num_params <= target
    assert numel(pruner.model) == pruner.num_params == numel(meta_model(pruner.model.config))
    assert is_differing(pruner.model) and type(pruner.model).__name__.startswith(PREFIX)
    for removal in pruner.removals:
        layers = {unit.split(".")[1] for unit in removal.units if unit != "hidden"}
        assert len(layers) == (removal.kind != "hidden"), removal
        assert removal.kind in removal.saliencies and set(removal.saliencies) <= {"hidden", "ffn", "kv", "query"}
    assert len({removal.kind for removal in pruner.removals}) >= 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", NAMES)
def test_retired_is_compacted_is_loaded(name: str, tmp_path: Path) -> None:
    pruner = start(make_model(name), compaction_tile=8)
    loop(pruner, 22)
    assert any(dim.endswith("ffn") for dim in pruner.state_dict()["retired"]), "nothing waits"
    before = logits(pruner.model)  # of a model whose retired units are zero
    pruner.compact()
    assert is_differing(pruner.model)
    torch.testing.assert_close(logits(pruner.model), before, rtol=0, atol=1e-11)
    if FAMILIES[name].heads_divide_hidden:
        loop(pruner, 10, start=22)  # a tile of hidden dimensions may be open in between, and is not saved
        before = logits(pruner.model)
    pruner.model.save_pretrained(tmp_path)
    loaded = efficientllm.load(str(tmp_path), torch.float64)
    assert_same_models(loaded, pruner.model)
    torch.testing.assert_close(logits(loaded.train()), before, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_scaled_positions(kind: str, tmp_path: Path) -> None:
    """Frequencies that change with the length of the text are computed from a config that knows no number of heads."""
    more = {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0]} if kind == "longrope" else {}
    original = {} if kind == "dynamic" else {"original_max_position_embeddings": 16}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **original, **more}
    model = make_model("mistral", dtype=torch.float32, rope_parameters=rope, sliding_window=None)
    pruner = start(model)
    loop(pruner, 32)
    model.save_pretrained(tmp_path)
    loaded = efficientllm.load(str(tmp_path))
    lengths = (8, 60, 90)
    for length in lengths:
        tokens = batch(length=length)
        torch.testing.assert_close(logits(loaded, tokens), logits(model.eval(), tokens), rtol=1e-5, atol=1e-5)
    assert is_differing(model) and pruner.done


def test_waiting_for_tiles_changes_no_removal() -> None:
    at_once, late = start(make_model("qwen2")), start(make_model("qwen2"), compaction_tile=4)
    loop(at_once, 20)
    loop(late, 20)
    assert rows(at_once) == rows(late) and rows(late)
    assert sum(at_once.space.shape.values()) < sum(late.space.shape.values()), "nothing waits"
    late.compact()
    assert_same_models(late.model, at_once.model, atol=1e-6)


def test_a_state_continues_where_it_was(tmp_path: Path) -> None:
    whole = start(make_model("llama-tied"), score_ema=0.5, compaction_tile=4)
    loop(whole, 32)
    first = start(make_model("llama-tied"), score_ema=0.5, compaction_tile=4)
    loop(first, 17)
    state = json.loads(json.dumps({key: value for key, value in first.state_dict().items() if key != "average"}))
    state["average"] = {name: scores.clone() for name, scores in first.state_dict()["average"].items()}
    assert state["retired"] and is_differing(first.model)
    model = meta_model(first.model.config).to_empty(device="cpu").double().train()
    model.tie_weights()
    model.load_state_dict(first.model.state_dict())
    second = start(model, limits=first.limits, score_ema=0.5, compaction_tile=4)
    for mine, theirs in zip(model.parameters(), first.model.parameters(), strict=True):
        second.optimizer.state[mine] = {key: value.clone() for key, value in first.optimizer.state[theirs].items()}
    for name, buffer in model.named_buffers():
        buffer.copy_(dict(first.model.named_buffers())[name])
    second.load_state_dict(state)
    second.target_params = first.target_params
    loop(second, 15, start=17)
    assert rows(first) + rows(second) == rows(whole)
    assert_same_models(second.model, whole.model)


# --- the model that is left -------------------------------------------------------------------------------------------


def cut_ffn(model: Any, layer: int) -> None:
    space = find_space(model, per_layer=True)
    units = {f"layers.{layer}.ffn": [3, 5]}
    retire_(model, None, space, units)
    compact_(model, None, space, units)


def test_layers_that_end_alike_are_an_ordinary_model(tmp_path: Path) -> None:
    model = make_model("qwen2", dtype=torch.float32)
    stock = type(model)
    cut_ffn(model, 0)
    assert is_differing(model) and type(model) is not stock
    model.save_pretrained(tmp_path / "differing")
    assert "auto_map" in json.loads((tmp_path / "differing/config.json").read_text())
    for layer in range(1, LAYERS):
        cut_ffn(model, layer)
    assert type(model) is stock and not is_differing(model) and model.config.intermediate_size == 38
    saved = stock_model(model, torch.float32, was_llama=False)
    for each, folder in ((model, "live"), (saved, "saved")):
        assert type(each) is stock
        each.save_pretrained(tmp_path / folder)
        assert not list((tmp_path / folder).glob("*.py"))
        raw = json.loads((tmp_path / folder / "config.json").read_text())
        assert not {"auto_map", "per_layer_config"} & set(raw) and raw["architectures"] == ["Qwen2ForCausalLM"]
        assert all(module.config is each.config for module in each.modules() if hasattr(module, "config"))


@pytest.mark.parametrize("name", NAMES)
def test_generates_through_a_cache_of_different_heads(name: str) -> None:
    model = make_model(name, dtype=torch.float32, **differing(name)).eval()
    heads = [layer.self_attn.k_proj.out_features for layer in model.model.layers if hasattr(layer.self_attn, "k_proj")]
    assert len(set(heads)) > 1 or FAMILIES[name].fused
    tokens = batch()
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 60}
    with_cache = model.generate(tokens, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(tokens, use_cache=False, **settings))


def test_every_layer_follows_the_attention_that_is_chosen() -> None:
    model = make_model("phi3", dtype=torch.float32, **differing("phi3")).eval()
    expected = logits(model)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    found = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert found == {"eager"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_the_oracle_is_a_stock_model_whose_missing_units_are_zero() -> None:
    """A stock Qwen2 of the widest layer, with zeros where the other is narrower, is the same function."""
    small = make_model("qwen2", dtype=torch.float32, **differing("qwen2")).eval()
    wide = make_model("qwen2", dtype=torch.float32).eval()

    def filled(kept: Tensor, like: Tensor) -> Tensor:
        padded = torch.zeros_like(like)
        padded[tuple(slice(size) for size in kept.shape)] = kept
        return padded

    with torch.no_grad():
        for param, kept in zip(wide.parameters(), small.parameters(), strict=True):
            param.copy_(filled(kept, param))
        # one KV group of two queries is left; the stock one has three a group, whose third writes nothing
        assert [layer.self_attn.q_proj.out_features for layer in small.model.layers] == [48, 16]
    torch.testing.assert_close(logits(small), logits(wide), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        wide.model.layers[1].mlp.down_proj.weight[:, 31] = 0
    assert (logits(small) - logits(wide)).abs().max() > 1e-3


def test_the_file_beside_the_weights_is_all_that_transformers_needs(tmp_path: Path) -> None:
    """In a process that cannot import efficientllm; without remote code the stock class refuses."""
    model = save(tmp_path / "m", "mistral", **differing("mistral"))
    (tmp_path / "expected.txt").write_text(repr(logits(model, batch() % 61)[0, -1, :4].tolist()))
    code = (
        "import sys; sys.modules['efficientllm'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"path = {str(tmp_path / 'm')!r}\n"
        f"tokens = torch.tensor({(batch() % 61).tolist()})\n"
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)\n"
        "print(type(model).__module__.partition('.')[0])\n"
        "print(model(input_ids=tokens, use_cache=False).logits[0, -1, :4].tolist())\n"
        "try: AutoModelForCausalLM.from_pretrained(path)\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    module, found, refused = done.stdout.splitlines()
    assert module == "transformers_modules" and refused == "AmbiguousGlobalPerLayerAttributeError"
    assert json.loads(found) == pytest.approx(json.loads((tmp_path / "expected.txt").read_text()), abs=1e-5)


def test_weights_of_other_widths_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "m", "mistral", **differing("mistral"))
    file = tmp_path / "m/config.json"
    raw = json.loads(file.read_text())
    raw["per_layer_config"]["0"]["intermediate_size"] = 36
    file.write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match=r"do not fit config\.json"):
        efficientllm.load(str(tmp_path / "m"))
    with pytest.raises(UnsupportedModelError, match="--layout per-layer"):
        find_space(meta_model(AutoConfig.from_pretrained(tmp_path / "m")))


@pytest.mark.parametrize("name", NAMES)
def test_configs_read_back_what_was_written(name: str, tmp_path: Path) -> None:
    model = meta_model(make_config(name))
    shape = find_space(model, per_layer=True).shape | {"layers.0.ffn": 33, "layers.1.kv": 1}
    resize_config(model, shape, 8)
    model.config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert find_space(meta_model(again), per_layer=True).shape == shape
