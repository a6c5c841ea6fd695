"""GGUF in llama.cpp itself: logits, tokens and types; skipped unless it is installed (`make test-edge`)."""

import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from helpers.edge import byte_level_tokenizer, save, sentence_piece_tokenizer
from helpers.families import EVERY, FAMILIES, differing

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; make test-edge installs it")

import efficientllm.demo
from efficientllm.cli import main
from efficientllm.delivery import llama_cpp
from efficientllm.delivery.child import in_child
from efficientllm.delivery.gguf import contents, convert
from efficientllm.delivery.gguf.tensors import permute
from efficientllm.delivery.gguf.tokenizer import PRE_TOKENIZERS, swallows_space
from efficientllm.delivery.gguf.types import TYPES, plan_types
from efficientllm.delivery.proof import TEXTS
from efficientllm.models.heterogeneous import ALLOWANCE
from helpers.paths import SHARED

DEMO = Path(efficientllm.demo.__file__).parent / "model"
STORIES = SHARED / "models/stories260K"
SQUARE = {"hidden_size": 48}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 512,
    },
}


def export(folder: Path, type: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Exports to `folder`.gguf, which must prove itself, and returns what llama.cpp's proof says."""
    capsys.readouterr()
    code = main(["export", str(folder), "--to", "gguf", "--type", type, "--out", f"{folder}.gguf", "--overwrite"])
    out, error = capsys.readouterr()
    assert code == 0, error
    return next(line for line in out.splitlines() if line.startswith("llama.cpp: "))


def difference(line: str) -> float:
    found = re.search(r"largest difference (\S+) of", line)
    assert found
    return float(found.group(1))


@pytest.mark.parametrize(("name", "heads"), EVERY)
def test_every_family_computes_the_same(
    name: str, heads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "m", name, heads, num_hidden_layers=3, **FAMILIES[name].plain_gguf)
    line = export(tmp_path / "m", "f32", capsys)
    # llama.cpp looks Gemma's GELU up in half precision, see convert.HALF_GELU
    assert difference(line) < (1e-2 if FAMILIES[name].half_gelu else 1e-5), line


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2", SQUARE),
        ("phi3", SQUARE),
        ("olmo2", {**SQUARE, "tie_word_embeddings": True}),
        ("olmo2", {"hidden_size": 50, "tie_word_embeddings": True}),  # made wider by zeros, as the narrower one above
        ("smollm3", {"num_hidden_layers": 9}),  # the fourth and eighth have no positions
        ("smollm3", {"no_rope_layers": [1, 1]}),
        ("gemma3_text", {"num_hidden_layers": 7}),  # the sixth sees the whole context
        ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 144}),  # a 27B to llama.cpp, by its depth
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("mistral", {"sliding_window": None, "hidden_size": 25, "intermediate_size": 37}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ],
)
def test_what_the_tiny_configs_do_not_reach(
    name: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "m", name, **changes)
    line = export(tmp_path / "m", "f32", capsys)
    assert difference(line) < (1e-2 if FAMILIES[name].half_gelu else 1e-5), line


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.deci])
def test_layers_with_widths_of_their_own(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "m", name, num_hidden_layers=3, **differing(name))
    line = export(tmp_path / "m", "f32", capsys)
    assert difference(line) < 1e-5, line


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_0", "q4_k_m"])
def test_types_of_layers_with_widths_of_their_own(
    type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {0: {"intermediate_size": 512}, 1: {"num_attention_heads": 32, "num_key_value_heads": 32}}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64}
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3, **heads}
    save(tmp_path / "m", "mistral", "multihead", **sizes, per_layer_config=own)
    export(tmp_path / "m", type, capsys)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("name", ["llama", "granite", "qwen2", "qwen3", "smollm3", "phi3", "mistral, per layer"])
def test_rotary_scaling(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, per_layer, _ = name.partition(", per layer")
    if (name, kind) == ("qwen3", "llama3") or (name, kind) == ("qwen3", "longrope"):
        pytest.skip("refused, its graph has no rotary factors")
    if name == "phi3" and kind != "longrope":
        pytest.skip("refused by transformers")
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    changes = {"rope_parameters": rope, "max_position_embeddings": 2048 if kind == "longrope" else 128}
    if name == "phi3":
        changes |= {"original_max_position_embeddings": 512, "pad_token_id": 0, **SQUARE}
    if per_layer:
        changes |= {"sliding_window": None, **differing(name), ALLOWANCE: kind == "longrope"}
    save(tmp_path / "m", name, **changes, **FAMILIES[name].plain_gguf)
    assert difference(export(tmp_path / "m", "f32", capsys)) < 1e-5


@pytest.mark.parametrize("type", TYPES)
def test_types_in_use(type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's model has learnt something, so that rounding its weights can only make it worse, and little."""
    shutil.copytree(DEMO, tmp_path / "m")
    line = export(tmp_path / "m", type, capsys)
    change = re.search(r"\(([+-]\S+)% of", line)
    assert change and -0.1 < float(change.group(1)) < 10, line


@pytest.mark.parametrize("hidden_size", [256, 96, 52])
@pytest.mark.parametrize("name", ["mistral", "llama-tied", "phi3"])
def test_types_are_what_llama_cpps_quantiser_writes(
    name: str, hidden_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden_size // 8 * 2}
    changes = {"hidden_size": hidden_size, "intermediate_size": 288, "num_hidden_layers": 11, **heads}
    save(tmp_path / "m", name, tie_word_embeddings=name == "llama-tied", sliding_window=None, **changes)
    plain, quantised = tmp_path / "plain.gguf", tmp_path / "quantised.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "is_installed", lambda: False)  # the proof would take its time, and is not the matter
        assert main(["export", str(tmp_path / "m"), "--to", "gguf", "--type", "f32", "--out", str(plain)]) == 0
    shapes = [(tensor.name, tuple(map(int, reversed(tensor.shape)))) for tensor in gguf.GGUFReader(plain).tensors]
    for type, (_, file_type) in TYPES.items():
        llama_cpp.quantize_file(plain, quantised, int(file_type))
        found = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(quantised).tensors}
        plans = plan_types(shapes, type, num_layers=11, many_groups=True, k_types=True)
        assert {plan.name: plan.type for plan in plans} == found, type


LLAMA3 = next(key[0][0] for key, name in PRE_TOKENIZERS.items() if name == "llama-bpe")
GPT_4O = next(key[0][0] for key, name in PRE_TOKENIZERS.items() if name == "gpt-4o")
TEKKEN = next(key[0][0] for key, name in PRE_TOKENIZERS.items() if name == "tekken")


def split(pattern: str) -> Any:
    return [pre_tokenizers.Split(Regex(pattern), "isolated")]


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level_tokenizer(),
        byte_level_tokenizer(split(LLAMA3), ignore_merges=True),
        byte_level_tokenizer(split(LLAMA3)),
        byte_level_tokenizer(split(LLAMA3.replace("{1,3}", ""))),
        byte_level_tokenizer(split(TEKKEN), ignore_merges=True),
        byte_level_tokenizer(split(GPT_4O)),
        sentence_piece_tokenizer(),
        sentence_piece_tokenizer(like="mistral"),
        sentence_piece_tokenizer(like="gemma"),
    ],
    ids=["gpt-2", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o", "llama-2", "mistral", "gemma"],
)
def test_tokenizers(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The export compares TEXTS itself; here also that it would notice."""
    save(tmp_path / "m", "llama", tokenizer=tokenizer)
    assert f"{len(TEXTS) + 1} texts tokenised identically" in export(tmp_path / "m", "f32", capsys)
    found = in_child("llama.cpp", llama_cpp.tokens, f"{tmp_path}/m.gguf", TEXTS)
    same = [ids == tokenizer(text)["input_ids"] for ids, text in zip(found, TEXTS, strict=True)]
    assert all(same) or ([text for text, is_same in zip(TEXTS, same, strict=True) if not is_same] == [TEXTS[3]])
    assert all(same) != swallows_space(tokenizer)
    assert found[1] != found[2]


@pytest.mark.parametrize("make", [byte_level_tokenizer, lambda: sentence_piece_tokenizer(like="gemma")])
def test_tokens_of_a_chat(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Special tokens inside a text, and added ones that are words."""
    tokenizer = make()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.add_tokens(["\n\n", "<tool>"])
    save(tmp_path / "m", "llama", tokenizer=tokenizer)
    export(tmp_path / "m", "f32", capsys)
    texts = ["<|user|>the inn<|end|>\n\n the hen <tool> in it</s>", "\n\n\n", "<tool><tool>the"]
    found = in_child("llama.cpp", llama_cpp.tokens, f"{tmp_path}/m.gguf", texts)
    assert found == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.skipif(not STORIES.is_dir(), reason="no shared models here")
@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_k_m"])
def test_a_real_model(type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stories.gguf"
    assert main(["export", str(STORIES), "--to", "gguf", "--type", type, "--out", str(out)]) == 0
    assert "tokenised identically" in capsys.readouterr().out


def test_a_runs_own_held_out_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "run/model", "llama")
    (tmp_path / "run/data/train-00").mkdir(parents=True)
    np.save(tmp_path / "run/data/train-00/valid-00000.npy", np.arange(512, dtype=np.uint16) % 200)
    line = export(tmp_path / "run", "f32", capsys)
    assert "2 × 64 tokens that the run held out" in line and difference(line) < 1e-5


@pytest.mark.parametrize("spoil", ["weights", "tokenizer"])
def test_a_failed_proof_leaves_no_file(
    spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if spoil == "weights":  # the same mistake in writing and reading back, which only the runtime can notice
        model = save(tmp_path / "m", "qwen2", **SQUARE)
        weights = dict(model.named_parameters())
        monkeypatch.setattr(convert, "load_model", lambda *_: swapped(model, weights))
    else:
        metadata = contents.tokenizer_metadata
        monkeypatch.setattr(
            contents,
            "tokenizer_metadata",
            lambda *given: metadata(*given) | {"tokenizer.ggml.add_bos_token": False},
        )
        save(tmp_path / "m", "llama")
    out = tmp_path / "m.gguf"
    assert main(["export", str(tmp_path / "m"), "--to", "gguf", "--type", "f32", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert ("another model" if spoil == "weights" else "tokenises '' otherwise") in error
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def swapped(model: Any, weights: dict[str, Any]) -> Any:
    """A model whose parameters as listed are not the ones it computes with: query rows in another order."""
    name = "model.layers.0.self_attn.q_proj.weight"
    listed = weights | {name: permute(weights[name].detach(), 6)}
    model.named_parameters = lambda: iter(listed.items())
    return model


def test_a_model_that_llama_cpp_aborts_at_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    from efficientllm.errors import EfficientLLMError

    with pytest.raises(EfficientLLMError, match=r"llama.cpp stopped: .+"):
        in_child("llama.cpp", llama_cpp.logits, str(tmp_path / "broken.gguf"), [[1, 2]])
