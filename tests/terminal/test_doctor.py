"""`doctor`: sees what is installed and what is broken, never breaks with it, and fits a terminal."""

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from efficientllm.cli import main
from efficientllm.distributed.host import allowed_cpus
from efficientllm.terminal import packages
from efficientllm.terminal.doctor import examine, hub_cache, report_lines
from efficientllm.terminal.packages import Package, is_allowed, read_claims, try_packages
from helpers.paths import ROOT

BROKEN_TORCH = "raise ImportError('libcudart.so.13: cannot open\\nshared object file')"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return examine()


def write_package(folder: Path, name: str, code: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    return folder


def tried(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, wanted: str = "") -> Package:
    """What doctor says of a package of this code."""
    monkeypatch.syspath_prepend(write_package(folder, name, code))
    return try_packages([Package(name, wanted)])[name]


def test_what_the_suite_needs_works_here(found: dict[str, Any]) -> None:
    assert found["problems"] == []
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [row["name"] + row["wanted"] for row in found["packages"]] == needed
    installed = {row["name"]: metadata.version(row["name"]) for row in found["packages"]}
    assert {row["name"]: row["found"] for row in found["packages"]} == installed
    assert found["extras"]["onnx"]["works"]


def test_tested_versions_are_those_of_the_constraints(found: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {row["name"]: row["tested"] for row in found["packages"]}
    assert all(f"{name}=={version}" in lines for name, version in tested.items())


def test_the_machine_is_this_one(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert found["processor"]["threads"] == len(allowed_cpus()) <= os.cpu_count()
    assert 1 <= found["processor"]["cores"] <= found["processor"]["threads"]
    assert 0 < found["memory"]["free_bytes"] <= found["memory"]["total_bytes"]
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert subprocess.run([found["torchrun"], "--help"], capture_output=True).returncode == 0


def test_the_cache_is_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert hub_cache() == Path(constants.HF_HUB_CACHE)
    monkeypatch.setenv("HF_HOME", "/somewhere")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert hub_cache() == Path("/somewhere/hub")


def test_the_table_fits_80_columns(found: dict[str, Any]) -> None:
    found = json.loads(json.dumps(found))
    found["packages"][0]["problem"] = "ImportError: " + "a long reason " * 20
    found["extras"]["wandb"] = {**found["extras"]["wandb"], "works": False, "install": "pip install it"}
    found["gpus"] = [{"name": "NVIDIA H100 80GB HBM3", "free_bytes": 79e9, "total_bytes": 80e9}] * 2
    lines = list(report_lines(found))
    assert max(len(line) for line in lines if "/" not in line) <= 80
    assert sum("NVIDIA H100" in line for line in lines) == 2
    assert any(line.startswith("torch ") for line in lines)


def test_a_broken_torch_is_one_line_and_the_rest_is_still_seen(tmp_path: Path) -> None:
    write_package(tmp_path, "torch", BROKEN_TORCH)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "efficientllm", "doctor", "--json"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "torch: ImportError: libcudart.so.13: cannot open shared object file; run pip install" in done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["packages"]}
    assert rows["torch"]["found"] is None
    assert rows["numpy"]["found"] == metadata.version("numpy")


def test_a_torch_that_is_too_old_is_named_with_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tried(tmp_path, monkeypatch, "zstandard", "__version__ = '0.1'", ">=0.23")
    assert (package.found, package.problem) == ("0.1", "0.1 is not >=0.23")


@pytest.mark.parametrize("code", ["import os; os._exit(7)", "import os; os.abort()", "raise SystemExit('no')"])
def test_a_package_that_ends_python_takes_no_other_with_it(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(write_package(tmp_path, "breaks", code))
    asked = [Package("pyyaml", ">=6.0.2"), Package("breaks", ""), Package("zstandard", ">=0.23")]
    done = try_packages(asked)
    assert [package.problem is None for package in done.values()] == [True, False, True]
    assert "ended Python" in (done["breaks"].problem or "")


def test_a_package_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "TIMEOUT", 5)
    package = tried(tmp_path, monkeypatch, "hangs", "import time; time.sleep(100)")
    assert package.problem == "its import took more than 5 s"


def test_what_a_package_prints_disturbs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tried(tmp_path, monkeypatch, "talks", "print('{}'); __version__ = '1.5'", ">=1")
    assert (package.found, package.problem) == ("1.5", None)


def test_a_dependency_that_is_missing_is_told_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tried(tmp_path, monkeypatch, "needy", "import nowhere_at_all")
    assert package.problem == "ModuleNotFoundError: No module named 'nowhere_at_all'"
    assert try_packages([Package("nowhere-at-all", "")])["nowhere-at-all"].problem == "not installed"


def test_a_folder_of_runs_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs_of_a_logger").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert try_packages([Package("runs_of_a_logger", "")])["runs_of_a_logger"].problem == "not installed"


def test_a_broken_extra_is_shown_and_breaks_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(write_package(tmp_path, "wandb", "raise RuntimeError('half an install')"))
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no: wandb: RuntimeError: half an install pip install 'efficientllm[wandb]'" in shown


@pytest.mark.parametrize(
    ("version", "wanted", "allowed"),
    [
        ("2.13.0+cpu", ">=2.8", True),
        ("2.7.1", ">=2.8", False),
        ("2.8.0", ">=2.8", True),
        ("2.8", ">=2.8.0", True),
        ("5.23.0", ">=5.20,<6", True),
        ("6.0.0", ">=5.20,<6", False),
        ("5.9.0", ">=5.20,<6", False),
        ("1", "", True),
    ],
)
def test_versions_compare_as_numbers(version: str, wanted: str, allowed: bool) -> None:
    assert is_allowed(version, wanted) is allowed


def test_without_a_checkout_the_installed_package_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "efficientllm-0.0.dist-info"
    place.mkdir()
    lines = ["Name: efficientllm", "Version: 0.0", "Requires-Python: >=3.11", "Requires-Dist: torch>=2.8"]
    lines += ["Requires-Dist: wandb>=0.19; extra == 'wandb'", "Requires-Dist: ruff>=0.15; extra == 'dev'"]
    (place / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    assert read_claims() == (">=3.11", {"": [Package("torch", ">=2.8")], "wandb": [Package("wandb", ">=0.19")]})


def test_it_loads_no_torch_itself() -> None:
    program = (
        "import sys; import efficientllm.terminal.doctor; print(sorted({'torch', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout == "[]\n"
