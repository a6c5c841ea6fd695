"""`inspect`: agrees with what stock transformers builds, fits the terminal, and takes or refuses real configs."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from efficientllm.cli import main
from efficientllm.space.families import FAMILIES
from helpers.paths import SHARED

CONFIGS = SHARED / "data/configs"
SIZES = {  # all differ, and Mistral takes any hidden size
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": 260,
    "tie_word_embeddings": True,
}


def num_params(**changes: int) -> int:
    """The oracle: what stock transformers builds."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        return int(MistralForCausalLM(MistralConfig(**{**SIZES, **changes})).num_parameters())


def test_inspect_agrees_with_models_that_transformers_builds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "dtype": "bfloat16", **SIZES}))
    assert main(["inspect", str(tmp_path), "--min-hidden", "16", "--min-ffn", "20"]) == 0  # no weights there
    out = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[-5:]
        for line in out.splitlines()
        if line[:6].strip() in ("hidden", "ffn", "kv", "query")
    }
    source = num_params()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    expected = {
        "hidden": ["1", "48", source - num_params(hidden_size=47), "1", "16"],
        "ffn": ["2", "80", source - num_params(intermediate_size=79), "1", "20"],
        "kv": ["2", "3", source - num_params(**heads), "1", "1"],
        "query": ["6", "2", source - num_params(num_attention_heads=3), "1", "1"],
    }
    assert rows == {
        kind: [cell if isinstance(cell, str) else f"{cell:,}" for cell in row] for kind, row in expected.items()
    }
    least = num_params(hidden_size=16, intermediate_size=20, num_attention_heads=1, num_key_value_heads=1)
    assert f"{source:,} parameters" in out and f"{least:,} parameters" in out and "bfloat16" in out
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


def test_inspect_says_why_a_kind_is_frozen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    multi_head = {**SIZES, "num_key_value_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **multi_head}))
    assert main(["inspect", str(tmp_path), "--round-to", "40"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"(?m)^query .* frozen +1$", out) and re.search(r"(?m)^query: ", out)
    assert re.search(r"(?m)^kv .* 4 +4$", out)  # 4 heads of 10 make 40 columns
    assert re.search(r"(?m)^ffn .* 40 +40$", out)


@pytest.mark.parametrize("columns", [80, 120])
def test_inspect_fits_the_terminal(columns: int, tmp_path: Path) -> None:
    large = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **large, **heads}))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    command = [sys.executable, "-m", "efficientllm", "inspect", "."]
    process = subprocess.Popen(command, stdout=theirs, cwd=tmp_path, env={**environment, "TERM": "xterm"})
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(timeout=240) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).split("\r\n")
    assert max(len(line) for line in lines) <= columns
    assert sum("1,073,741,824" in line for line in lines) == 1  # whole, on one line
    assert not any("…" in line for line in lines)


@pytest.mark.skipif(not CONFIGS.exists(), reason="no shared configs")
def test_inspect_takes_real_configs_or_refuses_them_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in sorted(CONFIGS.glob("*.json")):
        folder = tmp_path / file.stem
        folder.mkdir()
        shutil.copy(file, folder / "config.json")
        raw = json.loads(file.read_text())
        if raw["model_type"] in FAMILIES:
            assert main(["inspect", str(folder)]) == 0, file.name
            out, err = capsys.readouterr()
            assert f"{raw['hidden_size']:,}" in out and raw["model_type"] in out and err == "", file.name
        else:
            assert main(["inspect", str(folder)]) == 2, file.name
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("efficientllm: error: ") and err.count("\n") == 1, file.name
            assert raw["model_type"] in err or ("quantised" in err and "quantization_config" in raw), file.name


@pytest.mark.parametrize(
    ("family", "decoder"), [("gpt2", "GPT2LMHeadModel"), ("codegen", "CodeGenForCausalLM"), ("gemma3", "")]
)
def test_an_unknown_family_is_refused_without_torch(family: str, decoder: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "architectures": [decoder]}))
    program = (
        "import sys\nfrom efficientllm.cli import main\n"
        f"code = main(['inspect', {str(tmp_path)!r}])\n"
        "print(code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout == "2 []\n"
    assert f"model {tmp_path}: {family}: cannot be pruned" in done.stderr and done.stderr.count("\n") == 1
