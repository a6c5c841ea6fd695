"""DDP, FSDP and HSDP on gloo ranks against one process: one torchrun launch per number of ranks runs all its cases."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def torchrun(num_ranks: int, *words: str, timeout: int = 600) -> "subprocess.CompletedProcess[str]":
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *words], capture_output=True, text=True, timeout=timeout, env=env, check=False)


@pytest.mark.parametrize(
    ("num_ranks", "engines", "families"),
    [
        (2, "ddp,fsdp", "llama-tied,qwen2"),
        pytest.param(2, "ddp,fsdp", "llama,llama-bias,qwen3,phi3,gemma2", marks=pytest.mark.slow),
        pytest.param(4, "ddp,fsdp,hsdp", "llama-tied,olmo2,qwen2", marks=pytest.mark.slow),
    ],
)
def test_every_engine_prunes_as_one_process_does(num_ranks: int, engines: str, families: str, tmp_path: Path) -> None:
    """In float64, over 60 steps with several compactions, variants A and B."""
    out = tmp_path / "results.json"
    done = torchrun(num_ranks, str(HERE / "ranks.py"), str(out), engines, families)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, Any]] = json.loads(out.read_text())
    assert len(results) == len(engines.split(",")) * len(families.split(",")) * 2 + 1
    told = results.pop("disagreement")
    assert "ranks 0 and 1 chose different units" in told["error"] and "nothing was removed" in told["error"]
    for case, found in results.items():
        assert found["removals"] > 25 and found["same_removals"], case
        assert found["loss"] < 1e-5 and found["weights"] < 1e-10, case
    kinds = {kind for found in results.values() for kind in found["kinds"]}
    assert {"ffn", "hidden"} < kinds, "no head was ever removed"
