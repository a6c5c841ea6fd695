"""ONNX: every family in onnxruntime, by our own session and by transformers' loader of exported folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from helpers.edge import save
from helpers.families import NAMES, batch, logits

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from efficientllm.cli import main
from efficientllm.delivery import onnx_export
from efficientllm.delivery.onnx_runtime import Session, generate

ODD = {"hidden_size": 25, "intermediate_size": 37, "sliding_window": None}


def export(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    code = main(["export", str(folder), "--to", "onnx", "--out", str(folder.parent / "onnx")])
    out, error = capsys.readouterr()
    assert (code, error) == (0, "")
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in NAMES), ("mistral", ODD), ("qwen2", ODD)])
def test_every_family_computes_and_generates_the_same(
    name: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "m", name, **changes)
    said = export(tmp_path / "m", capsys)
    assert "generated the same 16 tokens with the cache" in said
    session = Session(tmp_path / "onnx")
    tokens = batch(seed=3, rows=3, length=20)
    whole = session(tokens.numpy())
    expected = logits(model, tokens).numpy()
    assert np.abs(whole - expected).max() < 1e-4 * np.abs(expected).max()
    session.reset()
    parts = [session(tokens[:, start:stop].numpy()) for start, stop in ((0, 7), (7, 8), (8, 20))]
    assert np.abs(np.concatenate(parts, 1) - expected).max() < 1e-4 * np.abs(expected).max()
    other = logits(model, tokens.flip(1)).numpy()
    assert np.abs(whole - other).max() > 1e-2 * np.abs(expected).max()  # the control


@pytest.mark.slow
def test_transformers_loads_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.exporters.base import ExportedModel

    model = save(tmp_path / "m", "llama")
    export(tmp_path / "m", capsys)
    tokens = batch(length=9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens[:, :4], past_key_values=cache, use_cache=True)
    exported = ExportedModel.from_pretrained(tmp_path / "onnx")
    found = exported(
        input_ids=tokens[:, 4:],
        attention_mask=torch.ones_like(tokens),
        position_ids=torch.arange(4, 9)[None].repeat(2, 1),
        past_key_values=cache,
    )
    torch.testing.assert_close(found.logits, logits(model, tokens)[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["logits", "tokens"])
def test_a_failed_proof_leaves_no_folder(
    spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "m", "llama")
    if spoil == "logits":
        monkeypatch.setattr(Session, "__call__", lambda self, ids, real=Session.__call__: real(self, ids) * 1.001)
    else:
        monkeypatch.setattr(onnx_export, "generate", lambda *given: [(id + 1) % 9 for id in generate(*given)])
    assert main(["export", str(tmp_path / "m"), "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 2
    error = capsys.readouterr().err
    assert ("computes something else" if spoil == "logits" else "onnxruntime generates") in error and error.count(
        "\n"
    ) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_without_the_extra_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "m", "llama")
    monkeypatch.setattr(onnx_export, "PARTS", ("onnx", "no_such_part"))
    assert main(["export", str(tmp_path / "m"), "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 2
    assert "no_such_part; pip install 'efficientllm[onnx]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
