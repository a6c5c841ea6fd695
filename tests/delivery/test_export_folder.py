"""`export --to hf`: another dtype, files of a given size, and the same model in them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from efficientllm.cli import main
from helpers.edge import save
from helpers.families import NAMES, batch, logits


@pytest.mark.parametrize("name", NAMES)
def test_every_family(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "m", name)
    (tmp_path / "m/README.md").write_text("a card")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "m"), "--to", "hf", "--dtype", "bf16", "--out", str(out)]) == 0
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == torch.bfloat16
    assert type(again) is type(model)
    for key, param in model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[key], param.to(torch.bfloat16)), key
    text = "the inn in the hen"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(tmp_path / "m")(text)
    assert (out / "README.md").read_text() == "a card"
    assert "1 file, bf16" in capsys.readouterr().out


def test_shards(tmp_path: Path) -> None:
    model = save(tmp_path / "m", "llama", intermediate_size=400)
    flags = ["--to", "hf", "--dtype", "float32", "--shard-size", "100KB", "--out", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "m"), *flags]) == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 110_000 for file in files)
    assert sum(len(load_file(file)) for file in files) == len(dict(model.named_parameters()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again, batch(5)), logits(model, batch(5)))


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "m", "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").write_text("old")
    flags = ["export", str(tmp_path / "m"), "--to", "hf", "--dtype", "fp16", "--out", str(tmp_path / "out")]
    assert main(flags) == 2
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "out/kept").read_text() == "old"
    assert main([*flags, "--overwrite"]) == 0
    assert not (tmp_path / "out/kept").exists() and (tmp_path / "out/config.json").exists()
