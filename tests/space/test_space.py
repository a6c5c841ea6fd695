"""The pruning space against stock models: every count, every label, every limit."""

import json
import random
import warnings
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import AutoConfig

from efficientllm.errors import BudgetError, UnsupportedModelError
from efficientllm.space import Polynomial, find_limits, find_space
from efficientllm.space.families import FAMILIES as TABLES
from efficientllm.space.limits import check_target
from helpers.families import (
    EVERY,
    FAMILIES,
    FFN,
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    NAMES,
    VOCAB,
    make_config,
    make_model,
    meta_model,
    numel,
)
from helpers.paths import SHARED

CONFIGS = SHARED / "data/configs"


def resized(config: Any, shape: dict[str, int]) -> Any:
    config.hidden_size, config.intermediate_size = shape["hidden"], shape["ffn"]
    config.num_key_value_heads = shape["kv"]
    config.num_attention_heads = shape["kv"] * shape["query"]
    return config


@pytest.mark.parametrize("name, heads", EVERY)
def test_polynomial_counts_stock_models_of_any_shape(name: str, heads: str) -> None:
    space = find_space(meta_model(make_config(name, heads)))
    assert space.num_params(space.shape) == numel(meta_model(make_config(name, heads)))
    draw = random.Random(0)
    for _ in range(4):
        shape = {kind: draw.randint(1, size) for kind, size in space.shape.items()}
        shape["hidden"] = shape["kv"] * shape["query"] * draw.randint(1, 3)  # gemma2 and llama refuse other widths
        smaller = meta_model(resized(make_config(name, heads), shape))
        assert space.num_params(shape) == numel(smaller), shape
        if any(size != shape[kind] for kind, size in space.shape.items()):
            assert space.num_params(space.shape) != numel(smaller)  # control
        found = find_space(smaller)
        assert found.shape == shape and found.num_params(shape) == numel(smaller)


@pytest.mark.parametrize("name, heads", EVERY)
def test_units_own_whole_axes_once(name: str, heads: str) -> None:
    model = meta_model(make_config(name, heads))
    params = dict(model.named_parameters())
    space = find_space(model)
    for kinds in (("hidden", "ffn", "kv"), ("query",)):
        covered: dict[tuple[str, int], list[int]] = {}
        for dim in space.dims():
            for slot in dim.slots if dim.kind in kinds else ():
                owned = range(slot.start, slot.start + dim.size * slot.block)
                covered.setdefault((slot.param, slot.axis), []).extend(owned)
        for (param, axis), indices in covered.items():
            length = space.shape["kv"] * space.shape["query"] * HEAD_DIM  # the query rows of a fused qkv come first
            whole = length if kinds == ("query",) else params[param].shape[axis]
            assert sorted(indices) == list(range(whole)), (param, axis)
    tied = model.config.tie_word_embeddings
    assert space.tied == (("lm_head.weight",) if tied else ())
    assert {slot.param for dim in space.dims() for slot in dim.slots} == {
        key for key in params if not key.endswith(("q_norm.weight", "k_norm.weight")) or FAMILIES[name].norms == "heads"
    }


def test_roles() -> None:
    space = find_space(meta_model(make_config("llama-bias")))
    slots = {(dim.kind, slot.param, slot.axis): slot for dim in space.dims() for slot in dim.slots}
    layer = "model.layers.0."
    assert slots["ffn", layer + "mlp.gate_proj.bias", 0].role == "producer"
    assert slots["ffn", layer + "mlp.down_proj.weight", 1].role == "consumer"
    assert slots["kv", layer + "self_attn.q_proj.weight", 0].block == 3 * HEAD_DIM
    assert slots["kv", layer + "self_attn.k_proj.weight", 0].block == HEAD_DIM
    assert slots["kv", layer + "self_attn.o_proj.weight", 1].role == "consumer"
    assert slots["hidden", "lm_head.weight", 1].role == "consumer"
    assert slots["hidden", "model.embed_tokens.weight", 1].role == "producer"
    assert slots["hidden", layer + "mlp.down_proj.bias", 0].role == "producer"
    assert slots["hidden", layer + "input_layernorm.weight", 0].role == "rider"
    output = {
        (kind, param.rpartition(".layers.0.")[2], axis) for (kind, param, axis), slot in slots.items() if slot.output
    }
    assert {key for key in output if "layers" not in key[1]} == {
        ("hidden", "model.embed_tokens.weight", 1),
        ("hidden", "self_attn.o_proj.weight", 0),
        ("hidden", "mlp.down_proj.weight", 0),
        ("ffn", "mlp.down_proj.weight", 1),
        ("kv", "self_attn.o_proj.weight", 1),
        ("query", "self_attn.o_proj.weight", 1),
    }
    assert len(space.bundles["query"].dims) == LAYERS * 2 and len(space.bundles["kv"].dims) == LAYERS


def test_a_parameter_without_a_label_is_refused_by_name() -> None:
    model = meta_model(make_config("llama"))
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(6, device="meta"))
    with pytest.raises(
        UnsupportedModelError, match=r"llama: no axis labels for 'model.layers.1.self_attn.sinks' \(6,\)"
    ):
        find_space(model)
    model = meta_model(make_config("llama"))
    model.model.layers[0].mlp.gate_proj.weight = nn.Parameter(torch.zeros(HIDDEN, 3, 3, device="meta"))
    with pytest.raises(UnsupportedModelError, match=r"no axis labels for 'model.layers.0.mlp.gate_proj.weight'"):
        find_space(model)


def test_another_width_than_the_config_is_refused() -> None:
    model = meta_model(make_config("llama"))
    model.model.layers[0].mlp.gate_proj.weight = nn.Parameter(torch.zeros(FFN + 1, HIDDEN, device="meta"))
    with pytest.raises(UnsupportedModelError, match=r"axis 0 of 'model.layers.0.mlp.gate_proj.weight' has 41 entries"):
        find_space(model)


@pytest.mark.parametrize("family", ["gpt2", "opt", "cohere", "mixtral", "bloom"])
def test_unknown_families_are_refused_by_name(family: str) -> None:
    small: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 8, "hidden_size": 16, "num_attention_heads": 2}
    model = meta_model(AutoConfig.for_model(family, **small))
    with pytest.raises(UnsupportedModelError, match=rf"^{family}: cannot be pruned .*Supported: llama, mistral"):
        find_space(model)


@pytest.mark.skipif(not CONFIGS.exists(), reason="no shared configs")
def test_real_configs_build_or_are_refused_by_name() -> None:
    read = 0
    for path in sorted(CONFIGS.glob("*.json")):
        values = json.loads(path.read_text())
        family = values["model_type"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # old names of keys in old configs
            model = meta_model(AutoConfig.for_model(**values))
        if family not in TABLES:
            with pytest.raises(UnsupportedModelError, match=f"^{family}: "):
                find_space(model)
            continue
        space = find_space(model)
        assert space.num_params(space.shape) == numel(model), path.name
        limits = find_limits(space, model.config)
        check_target(space, limits, space.num_params(limits.floor))
        read += 1
    assert read > 20


def test_published_counts() -> None:
    """SmolLM-1.7B's trajectory (docs/method.md section 4), tied, multi-head."""
    config = AutoConfig.for_model(
        "llama", vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=True,
    )  # fmt: skip
    space = find_space(meta_model(config))
    for heads, ffn, hidden, millions in ((28, 8162, 2048, 1657), (24, 4739, 2048, 1102), (19, 3008, 1179, 451)):
        shape = {"hidden": hidden, "ffn": ffn, "kv": heads, "query": 1}
        assert space.num_params(shape) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_flops_count_what_a_forward_computes() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("llama", "llama-tied"):
        model = make_model(name)
        model.set_attn_implementation("eager")
        space = find_space(model)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros(1, 16, dtype=torch.long), use_cache=False)
        ours = space.flops_per_token(space.shape, 16) * 16
        masked = 12 * LAYERS * 6 * HEAD_DIM * 8 * 16  # the counter does not see that half the attention is masked
        norms = (2 * LAYERS + 1) * HIDDEN * 6 * 16  # gains are no matrices
        assert ours + masked - norms == pytest.approx(3 * counter.get_total_flops(), rel=0.005)


# --- limits -------------------------------------------------------------------------------------------------------


def limits_of(name: str = "llama", heads: str = "grouped", **flags: Any) -> Any:
    config = make_config(name, heads)
    return find_limits(find_space(meta_model(config)), config, **flags)


def test_small_models_take_every_size_down_to_the_floors() -> None:
    limits = limits_of()
    assert limits.tile == dict.fromkeys(limits.tile, 1)
    assert limits.floor == {"hidden": 1, "ffn": 32, "kv": 1, "query": 1}  # its stem is below the default floor of 32
    assert limits.legal_sizes("ffn", FFN) == list(range(32, FFN + 1))
    assert limits_of(min_ffn=7, min_hidden=9, min_kv=2).floor == {"hidden": 9, "ffn": 7, "kv": 2, "query": 1}
    assert limits_of(min_ffn=FFN).floor["ffn"] == FFN
    with pytest.raises(BudgetError, match=f"--min-ffn 1000: the source has only {FFN}"):
        limits_of(min_ffn=1000)


def test_rounding_is_a_property_of_the_result() -> None:
    limits = limits_of(round_to=16, min_ffn=1, min_hidden=1)
    assert limits.tile == {"hidden": 16, "ffn": 16, "kv": 2, "query": 1}
    assert limits.legal_sizes("ffn", FFN) == [16, 32, 40]  # the source's own size stays legal
    assert limits.close({"hidden": 20, "ffn": 39, "kv": 2, "query": 3}) == {
        "hidden": 16,
        "ffn": 32,
        "kv": 2,
        "query": 3,
    }
    assert limits.close(limits.source) == limits.source
    odd = limits_of(heads="grouped", round_to=64)
    assert odd.floor["query"] == 3 and "multiples of 64" in odd.notes["query"]
    assert odd.floor["kv"] == 2 and odd.legal_sizes("kv", 2) == [2]


def test_large_models_round_to_64() -> None:
    config = make_config("llama", vocab_size=400_000)
    assert find_limits(find_space(meta_model(config)), config).tile["hidden"] == 64


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads", ["grouped", "multihead"])
def test_every_legal_shape_is_accepted_by_its_family(name: str, heads: str) -> None:
    limits = limits_of(name, heads, min_ffn=38)
    constrained = FAMILIES[name].heads_divide_hidden
    assert (limits.tile["hidden"] > 1) == constrained
    refused = 0
    for hidden in range(1, HIDDEN + 1):
        for kv in limits.legal_sizes("kv", limits.source["kv"]):
            for query in limits.legal_sizes("query", limits.source["query"]):
                shape = {"hidden": hidden, "ffn": 38, "kv": kv, "query": query}
                config = resized(make_config(FAMILIES[name].saved_as or name, heads), shape)
                try:
                    type(config).from_dict(config.to_dict())
                except StrictDataclassClassValidationError:
                    refused += 1
                    assert hidden not in limits.legal_sizes("hidden", HIDDEN)
    assert (refused > 0) == constrained  # control: the families without the constraint refuse nothing


def test_heads_are_frozen_where_no_width_fits_them() -> None:
    config = make_config("gemma2", hidden_size=20, num_attention_heads=10, num_key_value_heads=5)
    limits = find_limits(find_space(meta_model(config)), config)
    assert limits.floor["kv"] == 5 and limits.floor["query"] == 2 and limits.tile["hidden"] == 10
    assert "hidden_size % num_attention_heads" in limits.notes["kv"]


def test_targets_out_of_reach() -> None:
    config = make_config("llama")
    space = find_space(meta_model(config))
    limits = find_limits(space, config)
    source, least = space.num_params(limits.source), space.num_params(limits.floor)
    for good in (source, least, source - 1):
        check_target(space, limits, good)
    with pytest.raises(BudgetError, match="above the source's"):
        check_target(space, limits, source + 1)
    with pytest.raises(
        BudgetError, match=f"below the smallest reachable size {least:,} .*embedding alone holds {VOCAB}"
    ):
        check_target(space, limits, least - 1)
    for bad in (0, -5):
        with pytest.raises(BudgetError, match="must be a positive number"):
            check_target(space, limits, bad)
    for flags in ({"round_to": 0}, {"min_ffn": 0}, {"min_kv": -1}):
        with pytest.raises(BudgetError, match=r"must be at least 1|layers are never emptied"):
            find_limits(space, config, **flags)


def test_polynomials_add_and_multiply() -> None:
    one, a, b = Polynomial.of(1), Polynomial.of(2, "a"), Polynomial.of(3, "b")
    sizes = {"a": 5, "b": 7}
    assert ((a + b) * (a + one))(sizes) == (10 + 21) * 11 and (a * a).terms == {("a", "a"): 4}
