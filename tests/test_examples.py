"""The examples run as they stand and leave a model that loads."""

import json
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


@pytest.mark.slow
def test_notebook_from_scratch() -> None:
    """Every cell runs in a new kernel; the last but one has the result's shape, which must be the target's."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "prune_in_a_loop.ipynb", as_version=4)
    kept = [dict(cell) for cell in notebook.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[-1].source += "\nassert pruner.done, pruner.num_params"
    code[-1].source += "\nassert 300_000 - 4 * 3 * 96 < sum(p.numel() for p in model.parameters()) <= 300_000"
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}}).execute()
    for saved, made in zip(kept, notebook.cells, strict=True):  # what is saved has outputs where the run has them
        assert bool(saved.get("outputs")) == bool(made.get("outputs")), saved["source"]


def test_notebook_is_saved_with_its_outputs() -> None:
    """It was run from its first cell to its last, and is small enough to be read on a page."""
    path = EXAMPLES / "prune_in_a_loop.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for cell in cells for output in cell["outputs"] for kind in output.get("data", {})]
    assert "image/png" in kinds and "error" not in [
        output["output_type"] for cell in cells for output in cell["outputs"]
    ]
    assert path.stat().st_size < 400_000
