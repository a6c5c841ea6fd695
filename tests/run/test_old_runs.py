"""Run folders that version 0.1.0 wrote, stopped in the middle of pruning: they go on, report and compare as they did.

data/runs-0.1.0.tar.xz holds a tiny random Mistral (15,576 parameters) and three runs of it that a signal stopped at
step 11 of 36, with what each gave when it was not stopped (expected.json). Their configs have that version's names:
`score`, `saliency: fisher`, `activation_checkpointing: true`.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import efficientllm
from efficientllm.cli import main
from helpers.runs import rows

ARCHIVE = Path(__file__).parent / "data/runs-0.1.0.tar.xz"
RUNS = ("uniform", "per-layer", "distilled")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_it_reports_and_goes_on_to_the_same_end(
    name: str, old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(old)
    expected: dict[str, Any] = json.loads((old / "expected.json").read_text())[name]
    before = rows(old / name / "removals.jsonl")
    assert 0 < len(before) < len(expected["removals"]), "it was stopped in the middle of pruning"
    assert main(["report", name, "--no-samples"]) == 0 and (old / name / "report.html").stat().st_size > 10_000
    assert main(["prune", "--resume", "--out", name]) == 0, capsys.readouterr().err
    after, metrics = rows(old / name / "removals.jsonl"), rows(old / name / "metrics.jsonl")
    assert [(row["step"], row["kind"], row["units"]) for row in after] == [
        (row["step"], row["kind"], row["units"]) for row in expected["removals"]
    ]
    assert [row["loss"] for row in metrics[1:]] == pytest.approx(expected["losses"][1:], rel=1e-4)
    assert metrics[-1]["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-4)
    model = efficientllm.load(str(old / name / "model"))
    assert sum(param.numel() for param in model.parameters()) == after[-1]["params_after"] <= 9000


def test_they_compare(old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(old)
    assert main(["compare", *RUNS]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in RUNS)
