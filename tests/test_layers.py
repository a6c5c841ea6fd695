"""The cut of the code: imports point downwards, the mathematics knows neither modules nor runs."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src/efficientllm"
LAYERS = ["space", "pruning", "delivery", "training", "evaluation", "report", "demo", "cli"]  # lowest first
BESIDE = {"errors", "numbers"}
MATHEMATICS = ["saliency", "selection", "schedule", "compensation", "trajectory"]
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports, late imports included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    own = layer(file)
    if own not in LAYERS:  # the package itself, its errors and numbers
        return
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "efficientllm" and len(parts) > 1 and parts[1] in LAYERS:
            assert LAYERS.index(parts[1]) <= LAYERS.index(own), f"{own} imports {name}"


@pytest.mark.parametrize("name", MATHEMATICS)
def test_mathematics_takes_tensors_and_numbers(name: str) -> None:
    file = PACKAGE / f"pruning/{name}.py"
    found = imports(file)
    assert not any(each.split(".")[0] in ("transformers", "logging", "rich") for each in found)
    assert not any(each.startswith(("torch.nn", "torch.optim", "torch.distributed")) for each in found)


def test_distributed_is_the_business_of_engines_and_checkpoints() -> None:
    found = {file.name for file in FILES if any(name.startswith("torch.distributed") for name in imports(file))}
    assert found == {"engine.py", "checkpoint.py"}


def test_every_folder_is_a_layer() -> None:
    folders = {file.parent.name for file in FILES if file.name == "__init__.py" and file.parent != PACKAGE}
    assert folders <= set(LAYERS)
