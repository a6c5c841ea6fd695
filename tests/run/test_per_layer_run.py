"""`prune --layout per-layer` from the command line to the file on a device."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoTokenizer

import efficientllm
from efficientllm.cli import main
from efficientllm.delivery import llama_cpp
from efficientllm.delivery.gguf.size import FileSize
from efficientllm.space import find_limits, find_space
from helpers.edge import byte_level_tokenizer, save
from helpers.families import FAMILIES, NAMES, differing, make_config, meta_model, numel
from helpers.runs import STEPS, TARGET, arguments, num_rows, result_bytes, rows, start, wait_for

FITS = [name for name, family in FAMILIES.items() if family.deci]
SETTINGS = ["--layout", "per-layer", "--checkpoint-every", "4", "--save-at", "590000"]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted, in a process of its own."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = start([*arguments(data, out), *SETTINGS])
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out


def test_rows_carry_a_list_where_layers_differ(finished: Path) -> None:
    metrics, removals = rows(finished / "metrics.jsonl"), rows(finished / "removals.jsonl")
    assert metrics[0]["intermediate_size"] == 256 and metrics[0]["num_key_value_heads"] == 3
    last = metrics[-1]
    assert len(set(last["intermediate_size"])) > 1 and len(last["intermediate_size"]) == 4
    assert isinstance(last["hidden_size"], int)
    assert TARGET - 3 * last["hidden_size"] < last["params"] <= TARGET  # within one channel of one layer
    removed = [0] * 4
    for row in removals:
        if row["kind"] == "ffn":
            ((name, _),) = row["units"].items()
            removed[int(name.split(".")[1])] += 1
    assert [256 - size for size in last["intermediate_size"]] == removed
    config = json.loads((finished / "model/config.json").read_text())
    own = [
        config["per_layer_config"].get(str(n), {}).get("intermediate_size", config["intermediate_size"])
        for n in range(4)
    ]
    assert own == last["intermediate_size"]
    assert "trust_remote_code=True" in (finished / "model/README.md").read_text()
    saved_size = efficientllm.load(str(finished / "models/590k"))
    assert 590_000 - 3 * 96 < sum(param.numel() for param in saved_size.parameters()) <= 590_000


@pytest.mark.slow
def test_resume_ends_with_the_same_bytes(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start([*arguments(data, out), *SETTINGS])
    wait_for(lambda: num_rows(out) > 6, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    process = start(["prune", "--resume", "--out", str(out)])
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "at step 4" in output or "at step 8" in output
    assert result_bytes(out) == result_bytes(finished)
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == list(range(STEPS + 1))


def test_our_commands_take_it_without_remote_code(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(finished / "model")
    assert main(["generate", model, "Return the", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out) > len("Return the")
    assert main(["inspect", model]) == 0
    widths = rows(finished / "metrics.jsonl")[-1]["intermediate_size"]
    assert f"{min(widths)}-{max(widths)}" in capsys.readouterr().out
    assert main(["export", str(finished), "--to", "hf", "--dtype", "bf16", "--out", str(tmp_path / "bf16")]) == 0
    half = efficientllm.load(str(tmp_path / "bf16"), torch.float32)
    for mine, theirs in zip(half.parameters(), efficientllm.load(model).parameters(), strict=True):
        assert torch.equal(mine, theirs.bfloat16().float())
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    assert main(["export", str(finished), "--to", "gguf", "--type", "f32", "--out", str(tmp_path / "m.gguf")]) == 0
    assert "architecture deci" in capsys.readouterr().out
    assert gguf_widths(tmp_path / "m.gguf")["feed_forward_length"] == widths


def test_it_is_pruned_further(finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(data, tmp_path / "further", target_params="550k", prune_tokens="2048", tokens="2048")
    words[1] = str(finished / "model")
    assert main(words) == 2
    assert "--layout per-layer" in capsys.readouterr().err and not (tmp_path / "further").exists()
    assert main([*words, "--layout", "per-layer"]) == 0
    assert "model: 5" in capsys.readouterr().out


def test_plan_and_what_it_cannot_be(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(data, tmp_path / "out")
    assert main(["plan", *words[1:], "--layout", "per-layer"]) == 0
    found = re.search(r"ends as: ([\d,]+) parameters", capsys.readouterr().out)
    assert found and TARGET - 3 * 96 < int(found.group(1).replace(",", "")) <= TARGET
    for more, word in ((["--compile"], "--compile"), (["--layout", "mixed"], "--layout mixed")):
        assert main([*words, "--layout", "per-layer", *more]) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_resume_keeps_the_layout(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--resume", "--out", str(finished), "--layout", "uniform"]) == 2
    assert "--layout" in capsys.readouterr().err


# --- GGUF -------------------------------------------------------------------------------------------------------------


def gguf_widths(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    words = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
    return {word: fields[f"deci.{word}"].contents() for word in words}


@pytest.mark.parametrize("name", FITS)
def test_deci_holds_every_layers_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    model = save(tmp_path / "m", name, num_hidden_layers=3, **differing(name))
    out = tmp_path / "m.gguf"
    assert main(["export", str(tmp_path / "m"), "--to", "gguf", "--type", "f32", "--out", str(out)]) == 0
    assert gguf_widths(out) == {
        "feed_forward_length": [37, 32, 40],
        "attention.head_count": [6, 2, 6],
        "attention.head_count_kv": [2, 1, 2],
    }
    # an oracle of its own for the order of rows: pairs (i, i + 4) of each head of 8 become neighbours
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(out).tensors}
    for layer, heads in enumerate((6, 2, 6)):
        attention = model.model.layers[layer].self_attn
        projection = attention.qkv_proj if FAMILIES[name].fused else attention.q_proj
        rows_of = torch.cat([order + 8 * head for head in range(heads)])
        assert torch.equal(tensors[f"blk.{layer}.attn_q.weight"], projection.weight.detach()[rows_of])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FITS])
def test_families_without_room_are_refused_at_export_and_at_the_start(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "m", name, **differing(name))
    source = save(tmp_path / "source", name, attention_bias=False, hidden_size=48)
    there = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["export", str(tmp_path / "m"), "--to", "gguf", "--type", "f32", "--out", str(tmp_path / "o")]) == 2
    words = arguments(data, tmp_path / "run", target_params=str(numel(source) - 1), seq_len="32")
    words[1] = str(tmp_path / "source")
    assert main([*words, "--layout", "per-layer", "--for", "q8_0"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    reason = "no query and key norms" if FAMILIES[name].norms else "deci, llama.cpp's only"
    assert reason in first and reason in second and "--layout uniform" in second
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize(("name", "type"), [("qwen2", "q8_0"), ("mistral", "f16"), ("phi3", "q4_0")])
def test_bytes_are_those_of_the_file(name: str, type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    own = {0: {"intermediate_size": 64}, 1: {"num_attention_heads": 4, "num_key_value_heads": 2}}
    changes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 290}
    save(
        tmp_path / "m", name, tokenizer=byte_level_tokenizer(), **changes, **differing(name) | {"per_layer_config": own}
    )
    source = meta_model(make_config(name, **changes))
    space = find_space(source, per_layer=True)
    limits = find_limits(space, source.config, round_to=1)
    measure = FileSize("m", source, AutoTokenizer.from_pretrained(tmp_path / "m"), type, space, limits)
    shape = space.shape | {"layers.0.ffn": 64, "layers.1.query": 2}
    out = tmp_path / "m.gguf"
    assert main(["export", str(tmp_path / "m"), "--to", "gguf", "--type", type, "--out", str(out)]) == 0
    assert measure.written(shape) == out.stat().st_size


def test_a_target_in_bytes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "run", tmp_path / "model.gguf"
    words = arguments(data, out, target_params=None, target_bytes="400kB", prune_tokens=str(14 * 512))
    assert main([*words, "--for", "q8_0", "--layout", "per-layer"]) == 0
    assert main(["export", str(out), "--to", "gguf", "--type", "q8_0", "--out", str(file)]) == 0
    last = rows(out / "metrics.jsonl")[-1]
    sizes = last["intermediate_size"]
    assert all(size % 32 == 0 for size in sizes) and len(set(sizes)) > 1 and last["hidden_size"] % 32 == 0
    tile = 3 * 32 * last["hidden_size"] // 32 * 34
    assert 400_000 - max(8_000, tile) <= file.stat().st_size <= 400_000


def test_its_shape_from_scratch(finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(data, tmp_path / "fresh", target_params=None, prune_tokens=None, tokens="1024")
    words += ["--shape-of", str(finished), "--method"]
    assert main([*words, "random"]) == 2
    assert "its layers differ in width" in capsys.readouterr().err
    assert main([*words, "scratch", "--layout", "per-layer"]) == 0
    fresh, pruned = (efficientllm.load(str(each / "model")) for each in (tmp_path / "fresh", finished))
    shapes = [{name: param.shape for name, param in model.named_parameters()} for model in (fresh, pruned)]
    assert shapes[0] == shapes[1]
