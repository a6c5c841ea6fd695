"""The examples run as they stand and leave a model that loads."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", ["own_loop", "hf_trainer"])
def test_example(name: str, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    params = sum(param.numel() for param in AutoModelForCausalLM.from_pretrained(out).parameters())
    assert 450_000 - 4 * 3 * 96 < params <= 450_000
    assert AutoTokenizer.from_pretrained(out)("Return")["input_ids"]
