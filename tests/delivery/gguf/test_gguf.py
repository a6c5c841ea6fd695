"""GGUF without llama.cpp: the file is read by gguf's reader and by transformers' own loader of GGUF files."""

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from efficientllm import cli
from efficientllm.cli import main
from efficientllm.delivery import llama_cpp
from efficientllm.delivery.gguf import convert
from efficientllm.delivery.gguf.architecture import CANDIDATES, find_architecture, query_scale
from efficientllm.delivery.gguf.tensors import biases, permute, pieces, unpermute
from efficientllm.delivery.gguf.tokenizer import tokenizer_metadata
from efficientllm.delivery.gguf.types import TYPES, bits_per_weight, plan_types
from efficientllm.delivery.proof import TEXTS
from efficientllm.errors import UnsupportedModelError
from efficientllm.space.families import FAMILIES
from helpers.edge import byte_level_tokenizer, fast, save, sentence_piece_tokenizer
from helpers.families import EVERY, HEAD_DIM, logits
from helpers.families import FAMILIES as TINY

SQUARE = {"hidden_size": 48}  # heads × head_dim of the grouped layout


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs as on a machine without llama.cpp, also on one that has it: test_llama_cpp.py is for that."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


def export(folder: Path, type: str = "f32", *flags: str) -> Path:
    out = folder.parent / f"{type}.gguf"
    assert main(["export", str(folder), "--to", "gguf", "--type", type, "--out", str(out), *flags]) == 0
    return out


def values(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


# Tensors and metadata


@pytest.mark.parametrize(("name", "heads"), EVERY)
def test_every_family_is_written_and_read_back(
    name: str, heads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "m", name, heads, **TINY[name].plain_gguf)
    out = export(tmp_path / "m")
    said = capsys.readouterr().out
    assert "read back" in said and "not checked in llama.cpp" in said and "efficientllm[llamacpp]" in said
    stored = sum(tensor.n_elements for tensor in gguf.GGUFReader(out).tensors)
    params = sum(param.numel() for param in model.parameters())
    assert stored > params if TINY[name].widened else stored == params  # wider by zeros, as its graph wants


def test_every_family_of_the_space_has_an_architecture() -> None:
    assert set(CANDIDATES) == set(FAMILIES)
    assert set(cli.GGUF_TYPES) == set(TYPES)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama-tied", {}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", SQUARE),
        ("qwen3", {"attention_bias": False, "head_dim": 128}),
        ("gemma2", {"query_pre_attn_scalar": HEAD_DIM}),
        ("gemma3_text", {"query_pre_attn_scalar": HEAD_DIM}),
    ],
)
def test_transformers_reads_the_same_weights(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = save(tmp_path / "m", name, **changes)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=export(tmp_path / "m").name, dtype=torch.float32)
    read = dict(again.named_parameters())
    for key, param in model.named_parameters():
        torch.testing.assert_close(read[key], param, rtol=1e-6, atol=1e-6, msg=key)
    if name.split("-")[0] in ("llama", "mistral", "qwen2"):  # of the others it does not read all of the config
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_phi3s_fused_rows_are_split_where_its_own_architecture_has_no_room(tmp_path: Path) -> None:
    model = save(tmp_path / "m", "phi3")  # 48 query rows beside a hidden size of 24
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(export(tmp_path / "m")).tensors}
    qkv = model.model.layers[1].self_attn.qkv_proj.weight.detach()
    query, key, value = qkv.split([48, 16, 16])
    assert np.array_equal(tensors["blk.1.attn_v.weight"], value.numpy())
    pairs = torch.stack([query.view(6, 2, 4, 24)[:, 0], query.view(6, 2, 4, 24)[:, 1]], 2).reshape(48, 24)
    assert np.array_equal(tensors["blk.1.attn_q.weight"], pairs.numpy())
    assert not np.array_equal(tensors["blk.1.attn_k.weight"], key.numpy())


def test_permuting_back_is_the_identity() -> None:
    rows = torch.randn(24, 5)
    assert torch.equal(unpermute(permute(rows, 3), 3), rows)
    assert not torch.equal(permute(rows, 3), rows)
    assert permute(torch.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_hyper_parameters(tmp_path: Path) -> None:
    save(tmp_path / "m", "granite", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    found = values(export(tmp_path / "m"))
    expected = {
        "general.architecture": "granite",
        "granite.attention.key_length": 8,
        "granite.attention.head_count": 6,
        "granite.attention.head_count_kv": 2,
        "granite.rope.freq_base": 5e5,
        "granite.attention.layer_norm_rms_epsilon": np.float32(1e-2),
        "granite.embedding_scale": 2.0,
        "granite.residual_scale": np.float32(0.7),
        "granite.logit_scale": 1.5,
        "granite.attention.scale": 1.0,
        "granite.context_length": 64,
    }
    assert {key: found[key] for key in expected} == expected


def test_gemmas_windows_caps_and_norms(tmp_path: Path) -> None:
    model = save(tmp_path / "m", "gemma2", num_hidden_layers=3, attn_logit_softcapping=None)
    out = export(tmp_path / "m")
    found, tensors = values(out), {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}
    assert found["gemma2.attention.sliding_window"] == 5
    assert found["gemma2.attention.sliding_window_pattern"] == [True, False, True]
    assert (found["gemma2.attn_logit_softcapping"], found["gemma2.final_logit_softcapping"]) == (1e6, 30.0)
    norm = model.model.layers[2].post_feedforward_layernorm.weight.detach().numpy()
    assert np.allclose(tensors["blk.2.post_ffw_norm.weight"], norm + 1)
    query = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    assert np.allclose(tensors["blk.0.attn_q.weight"], query * (8 / 9) ** 0.5)  # scaled by 1/√9, the runtime by 1/√8
    assert query_scale(model.config, "gemma2") == pytest.approx((8 / 9) ** 0.5)


def test_a_window_that_the_architecture_lacks_cuts_the_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "m", "mistral")
    assert values(export(tmp_path / "m"))["llama.context_length"] == 5
    assert "context cut to 5 tokens" in capsys.readouterr().out
    save(tmp_path / "n" / "m", "mistral", sliding_window=None)
    assert values(export(tmp_path / "n" / "m"))["llama.context_length"] == 64


@pytest.mark.parametrize("spoil", ["a weight", "swapped rows", "a value"])
def test_a_file_that_is_not_the_model_is_noticed(
    spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control of reading back: what is written differs from what is compared."""

    def spoilt(path: Path, contents: Any, plans: Any, weights: Any) -> None:
        weights, metadata = dict(weights), dict(contents.values)
        key = "model.layers.1.self_attn.q_proj.weight"
        if spoil == "a weight":
            weights[key] = weights[key].clone().index_fill_(0, torch.tensor(3), 0)
        if spoil == "swapped rows":
            weights[key] = permute(weights[key], 6)
        if spoil == "a value":
            metadata["llama.rope.freq_base"] = 1e6
        write(path, replace(contents, values=metadata), plans, weights)

    write = convert.write_gguf
    monkeypatch.setattr(convert, "write_gguf", spoilt)
    save(tmp_path / "m", "llama")
    out = tmp_path / "m.gguf"
    assert main(["export", str(tmp_path / "m"), "--to", "gguf", "--type", "q8_0", "--out", str(out)]) == 2
    assert "rope.freq_base" in (error := capsys.readouterr().err) or "blk.1.attn_q.weight" in error
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# Types


@pytest.mark.parametrize("type", [name for name in TYPES if name not in ("q4_k_m", "q5_k_m", "q6_k")])
def test_types(type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "m", "mistral", hidden_size=64, intermediate_size=80)  # 80 columns fit no block of 32
    out = export(tmp_path / "m", type)
    reader, wanted = gguf.GGUFReader(out), TYPES[type][0]
    found = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert found["blk.0.ffn_up.weight"] == wanted
    assert found["blk.0.ffn_down.weight"] == (wanted if wanted in (T.F32, T.F16, T.BF16) else T.F16)
    assert found["output.weight"] == (wanted if type in ("f32", "f16", "bf16") else T.Q8_0)
    assert found["output_norm.weight"] == T.F32
    bits = 8 * sum(tensor.n_bytes for tensor in reader.tensors) / sum(tensor.n_elements for tensor in reader.tensors)
    said = capsys.readouterr().out
    assert f"{type}: {bits:.2f} bits per weight" in said
    assert ("80 columns are not a multiple of 32" in said) == (wanted not in (T.F32, T.F16, T.BF16))


def test_k_types_fall_back_and_mix_as_llama_cpp_has_it() -> None:
    """Figures from llama.cpp's table of quantisations: Q4_K_M of Llama-3.1-8B is 4.92 GB in all, 4.58 GiB."""
    kv, hidden, ffn, vocab, layers = 1024, 4096, 14336, 128256, 32
    tensors: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (vocab, hidden)),
        ("output.weight", (vocab, hidden)),
    ]
    for layer in range(layers):
        shapes = {
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
        }
        shapes |= {"ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}
        tensors += [(f"blk.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
    plans = plan_types(tensors, "q4_k_m", num_layers=layers, many_groups=True, k_types=True)
    assert sum(plan.num_bytes for plan in plans) == pytest.approx(4.912e9, rel=2e-3)
    assert bits_per_weight(plans) == pytest.approx(4.89, abs=0.01)
    odd = plan_types(
        [("blk.0.attn_q.weight", (8, 96)), ("blk.0.attn_k.weight", (8, 50))],
        "q4_k_m",
        num_layers=9,
        many_groups=False,
        k_types=True,
    )
    assert [plan.type for plan in odd] == [T.Q5_0, T.F16]


# Tokenizers


def round_trip(folder: Path, tokenizer: Any, tmp_path: Path) -> Any:
    save(folder, "llama", tokenizer=tokenizer)
    return AutoTokenizer.from_pretrained(tmp_path, gguf_file=export(folder).name)


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentence_piece_tokenizer])
def test_transformers_reads_a_tokenizer_that_does_the_same(make: Callable[[], Any], tmp_path: Path) -> None:
    tokenizer = make()
    again = round_trip(tmp_path / "m", tokenizer, tmp_path)
    for text in TEXTS:
        if text != text.strip():
            continue  # transformers' own loader drops spaces at the ends
        assert (
            again(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def test_special_tokens_and_chat_template(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    save(tmp_path / "m", "llama", tokenizer=tokenizer)
    found = values(export(tmp_path / "m"))
    kinds = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<s>"], kinds["<|user|>"], kinds["<tool>"], kinds["the"], kinds["[PAD279]"]) == (3, 3, 4, 1, 5)
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("tokenizer", "pre"),
    [
        (byte_level_tokenizer(), "gpt-2"),
        (byte_level_tokenizer([pre_tokenizers.Split(Regex(LLAMA3), "isolated")], ignore_merges=True), "llama-bpe"),
        (byte_level_tokenizer([pre_tokenizers.Split(Regex(LLAMA3), "isolated")]), "dbrx"),
        (byte_level_tokenizer([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated")]), "qwen2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pre_tokenizers_by_what_they_do(tokenizer: Any, pre: str) -> None:
    assert tokenizer_metadata(tokenizer, 272)["tokenizer.ggml.pre"] == pre


def word_level() -> Any:
    inside = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "once": 2}, unk_token="<s>"))
    return fast(inside)


REFUSED_TOKENIZERS: list[tuple[Callable[[], Any], str]] = [
    (word_level, "a WordLevel tokenizer"),
    (lambda: byte_level_tokenizer([pre_tokenizers.Punctuation()]), "Punctuation with these settings"),
    (lambda: sentence_piece_tokenizer([("h", "e"), ("t", "he"), ("t", "h")]), "its merges lack 'th' + 'e'"),
    (lambda: sentence_piece_tokenizer([("h", "e"), ("t", "h"), ("t", "he"), ("i", "n"), ("th", "e")]), "interleave"),
]


@pytest.mark.parametrize(
    ("make", "words"), REFUSED_TOKENIZERS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_tokenizers_that_llama_cpp_has_not(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words.replace("+", r"\+")):
        tokenizer_metadata(make(), 272)


# What fits no architecture


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3", {}, "a bias in o_proj"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic'",
        ),
        ("llama", {"hidden_act": "relu"}, "the activation 'relu'"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "no_rope_layers other than every fourth"),
        ("gemma", {"tie_word_embeddings": False}, "an untied output head"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = save(tmp_path / "m", name, **changes)
    with pytest.raises(UnsupportedModelError, match=words.replace("(", r"\(")):
        find_architecture(model.config, biases(model))


def test_the_best_architecture_that_fits(tmp_path: Path) -> None:
    for name, changes, expected in (
        ("qwen2", SQUARE, "qwen2"),
        ("qwen2", {}, "llama"),
        ("phi3", SQUARE, "phi3"),
        ("phi3", {}, "llama"),
    ):
        model = save(tmp_path / f"{name}{expected}", name, **changes)
        assert find_architecture(model.config, biases(model)) == expected
        assert len({piece.name for piece in pieces(model, expected)}) == len(pieces(model, expected))


# Bad input


def refusal(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("efficientllm: error: ") and error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    return error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--to gguf --type q9_0 --out OUT", ["--type q9_0", "did you mean q"]),
        ("--to ggml --type q8_0 --out OUT", ["--to ggml", "did you mean gguf"]),
        ("--to gguf --out OUT", ["--type is missing"]),
        ("--to gguf --type f16", ["--out is missing"]),
        ("--to gguf --type f16 --dtype bf16 --out OUT", ["--dtype bf16", "does not apply to --to gguf", "remove it"]),
        ("--to hf --out OUT", ["--dtype is missing"]),
        ("--to hf --dtype int4 --out OUT", ["--dtype int4"]),
        ("--to hf --dtype bf16 --shard-size big --out OUT", ["--shard-size big"]),
        ("--to gguf --type f16 --out THERE", ["exists", "--overwrite"]),
        ("--to gguf --type f16 --overwrite --out FOLDER", ["is a folder"]),
        ("--to gguf --type q4_k_m --out OUT", ["--type q4_k_m", "efficientllm[llamacpp]"]),
        ("--to gguf --type f16 --out THERE/x.gguf", ["cannot be written"]),
    ],
)
def test_mistakes(flags: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "m", "llama")
    (tmp_path / "there").write_text("kept")
    (tmp_path / "folder").mkdir()
    places = {"OUT": "out", "THERE/x.gguf": "there/x.gguf", "THERE": "there", "FOLDER": "folder"}
    arguments = [str(tmp_path / places[word]) if word in places else word for word in flags.split()]
    line = refusal(["export", str(tmp_path / "m"), *arguments], tmp_path, capsys)
    assert all(word in line for word in words), line
    assert (tmp_path / "there").read_text() == "kept"


def test_models_that_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=272)).save_pretrained(tmp_path / "gpt2")
    byte_level_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("model: x\n")
    for folder, words in (("gpt2", "model_type 'gpt2'"), ("run", "not finished"), ("nowhere", "no such folder")):
        flags = ["--to", "gguf", "--type", "f16", "--out", str(tmp_path / "out.gguf")]
        assert words in refusal(["export", str(tmp_path / folder), *flags], tmp_path, capsys)


def test_a_finished_run_is_a_model(tmp_path: Path) -> None:
    save(tmp_path / "run/model", "llama")
    (tmp_path / "run/config.yaml").write_text("model: x\n")
    assert main(["export", str(tmp_path / "run"), "--to", "gguf", "--type", "f16", "--out", str(tmp_path / "o")]) == 0


def test_overwrite_replaces(tmp_path: Path) -> None:
    save(tmp_path / "m", "llama")
    (tmp_path / "f16.gguf").write_text("old")
    assert export(tmp_path / "m", "f16", "--overwrite").stat().st_size > 10_000


def test_no_space_is_one_line(tmp_path: Path) -> None:
    """Files may not grow beyond 20 kB here, and the model's is larger."""
    save(tmp_path / "m", "llama")
    flags = ["--to", "gguf", "--type", "f32", "--out", str(tmp_path / "out.gguf")]
    done = subprocess.run(
        [sys.executable, "-m", "efficientllm", "export", str(tmp_path / "m"), *flags],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2
    assert "no space left" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
