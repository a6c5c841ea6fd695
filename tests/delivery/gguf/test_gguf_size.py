"""The size of a GGUF file before there is one: against files that `export` really writes."""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from efficientllm.cli import main
from efficientllm.delivery import llama_cpp
from efficientllm.delivery.gguf.size import FileSize, row_blocks
from efficientllm.errors import UnsupportedModelError
from efficientllm.pruning.landing import can_land, is_landed, may_remove
from efficientllm.space import Limits, Space, find_limits, find_space
from efficientllm.space.dims import Measure, Shape
from helpers.edge import byte_level_tokenizer, save
from helpers.families import FAMILIES, HEAD_DIM, NAMES, make_config, meta_model

SOURCE = {"num_hidden_layers": 9, "hidden_size": 288, "intermediate_size": 544, "vocab_size": 290}
SHAPES = (  # hidden, ffn, KV heads, query heads of each; head_dim is 8
    (100, 69, 2, 3),
    (32, 64, 2, 2),
    (48, 96, 2, 3),  # square: heads × head_dim is the hidden size
    (256, 512, 2, 1),
    (288, 40, 1, 3),
)
PLAIN = ("f32", "f16", "q8_0", "q5_1", "q4_0")
K_TYPES = ("q4_k_m", "q5_k_m", "q6_k")


def changes(shape: tuple[int, ...]) -> dict[str, int]:
    hidden, ffn, kv, query = shape
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": kv * query,
        "num_key_value_heads": kv,
    }


def measure_of(
    name: str, type: str, title: str, tokenizer: Any, round_to: int | None, **values: Any
) -> tuple[FileSize, Space, Limits]:
    """The measure of a source of the family, with more of everything than SHAPES; rounded to the type's blocks."""
    config = make_config(name, "multihead", **{**SOURCE, **FAMILIES[name].plain_gguf, **values})
    empty = meta_model(config)
    space = find_space(empty)
    limits = find_limits(space, config, round_to=round_to or row_blocks(type, space.shape, space.head_dim))
    return FileSize(title, empty, tokenizer, type, space, limits), space, limits


def exported(folder: Path, type: str) -> int:
    """The bytes of the file that `export` writes."""
    out = folder.with_suffix(f".{type}.gguf")
    assert main(["export", str(folder), "--to", "gguf", "--type", type, "--out", str(out)]) == 0
    return out.stat().st_size


def check(name: str, shape: tuple[int, ...], types: tuple[str, ...], tmp_path: Path, **values: Any) -> None:
    layers = {"num_hidden_layers": SOURCE["num_hidden_layers"], "vocab_size": SOURCE["vocab_size"]}
    folder = tmp_path / "a"  # llama.cpp looks into names: at "phi3" it expects Phi-3's tokens
    save(
        folder,
        name,
        tokenizer=byte_level_tokenizer(),
        **{**layers, **FAMILIES[name].plain_gguf, **changes(shape), **values},
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hidden, ffn, kv, query = shape
    for type in types:
        measure, _, _ = measure_of(name, type, folder.name, tokenizer, 1, **values)
        found, real = measure.written({"hidden": hidden, "ffn": ffn, "kv": kv, "query": query}), exported(folder, type)
        is_square = hidden == kv * query * HEAD_DIM
        if is_square and FAMILIES[name].graphs > 1:
            # one of two architectures: the other's header has a few tensors and letters more
            assert real <= found <= real + 200 * 9, (name, type, shape)
        else:
            assert found == real, (name, type, shape)


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "×".join(map(str, shape)))
@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama-bias"])
@pytest.mark.usefixtures("without_llama_cpp")
def test_is_the_size_of_the_exported_file(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    if make_config(name).model_type in ("llama", "gemma2", "gemma3_text") and shape[0] % (shape[2] * shape[3]):
        pytest.skip("transformers refuses the shape")
    check(name, shape, PLAIN if name == "llama-tied" else ("q8_0", "q4_0"), tmp_path)


@pytest.mark.skipif(
    not llama_cpp.is_installed(), reason="llama-cpp-python is not installed; make test-edge installs it"
)
@pytest.mark.parametrize("shape", [(256, 512, 2, 3), (256, 288, 4, 8), (100, 69, 2, 1)], ids=str)
@pytest.mark.parametrize("name", ["mistral", "granite", "phi3", "olmo2"])
def test_is_the_size_that_llama_cpp_s_quantiser_writes(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    check(name, shape, K_TYPES, tmp_path)


def test_a_model_whose_widths_must_stay() -> None:
    """A Phi-3 that rotates a part of each head fits llama.cpp only where heads × head size is the hidden size."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedModelError, match=r"with hidden_size.*--min-hidden 32 --min-kv 4"):
        measure_of("phi3", "q8_0", "a-phi3", byte_level_tokenizer(), 1, hidden_size=32, rope_parameters=rope)


def land(space: Space, limits: Limits, measure: Measure, target: int, draw: random.Random) -> Shape:
    """Removes groups in a random order, as Pruner does, until it has landed."""
    shape = dict(limits.source)
    while not is_landed(shape, limits, measure, target):
        kinds = [kind for kind in shape if may_remove(kind, shape, limits, measure, [target])]
        assert kinds, f"stuck at {shape} on the way to {target}"
        shape[draw.choice(kinds)] -= 1
    return shape


@pytest.mark.parametrize(
    ("name", "type", "sizes"),
    [
        ("llama-tied", "q4_0", {}),
        ("qwen2", "q8_0", {}),
        ("phi3", "q4_0", {}),
        ("qwen2", "q4_0", {"hidden_size": 300, "intermediate_size": 801}),  # the source's own rows hold no blocks
        ("qwen3", "q4_k_m", {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 900}),
        ("mistral", "q5_k_m", {"hidden_size": 960, "intermediate_size": 2560, "vocab_size": 900}),
        ("gemma", "q6_k", {"intermediate_size": 2048, "vocab_size": 900}),
    ],
)
def test_lands_at_or_under_any_target(name: str, type: str, sizes: dict[str, int]) -> None:
    draw = random.Random(name + type)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    values = {"hidden_size": 320, "intermediate_size": 800, **heads, **sizes}
    measure, space, limits = measure_of(name, type, "a", byte_level_tokenizer(), None, **values)
    most, least, landed = measure(limits.source), measure(limits.floor), 0
    for _ in range(40):
        target = draw.randint(least, most - 1)
        if not can_land(limits.source, limits, measure, target):
            continue
        shape = land(space, limits, measure, target, draw)
        assert limits.close(shape) == shape
        wider = min(shape["ffn"] + limits.tile["ffn"], limits.source["ffn"])
        one = {**shape, "ffn": wider} if wider > shape["ffn"] else {**shape, "ffn": wider - limits.tile["ffn"]}
        tile = abs(measure(one) - measure(shape))
        assert target - max(0.02 * target, tile) <= measure.written(shape) <= target, (shape, target)
        landed += 1
    assert landed > 20


def test_without_whole_blocks_a_smaller_model_has_a_larger_file() -> None:
    """Negative control, and why other tiles are refused: nothing like it happens between legal shapes."""
    measure, space, _ = measure_of("llama", "q4_0", "a", byte_level_tokenizer(), None)
    whole, odd = {**space.shape, "hidden": 256}, {**space.shape, "hidden": 255}
    assert measure.written(odd) > 1.5 * measure.written(whole)
    assert measure(whole) > measure(odd) > measure({**space.shape, "hidden": 224})  # what a pace sees on its way


def test_legal_shapes_grow_with_their_sizes() -> None:
    for name, type in (("qwen2", "q4_0"), ("phi3", "q8_0"), ("mistral", "q5_1")):
        measure, _, limits = measure_of(name, type, "a", byte_level_tokenizer(), None)
        for kind in limits.source:
            sizes = limits.legal_sizes(kind, limits.source[kind])
            for others in (limits.source, limits.floor):
                found = [measure({**others, kind: size}) for size in sizes]
                assert found == sorted(found) and (len(found) > 1 or kind in ("kv", "query"))
