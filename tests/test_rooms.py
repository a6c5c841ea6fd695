"""The house: imports point downwards, no room is too large, the mathematics knows neither modules nor runs."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from helpers.paths import ROOT

PACKAGE = ROOT / "src/efficientllm"
ROOMS = [  # lowest first
    "config",
    "space",
    "models",
    "pruning",
    "delivery",
    "distributed",
    "data",
    "training",
    "baselines",
    "planning",
    "run",
    "evaluation",
    "report",
    "terminal",
    "demo",
    "cli",
]
MATHEMATICS = [
    "pruning/saliency",
    "pruning/selection",
    "pruning/schedule",
    "pruning/compensation",
    "pruning/trajectory",
]
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_FILES, MOST_LINES = 16, 0.2  # of a folder; of the whole package


def imports(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports: late imports, and those for types alone, included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def module(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    own = room(file)
    for name in imports(file):
        parts = name.split(".")
        if own in ROOMS and parts[0] == "efficientllm" and len(parts) > 1 and parts[1] in ROOMS:
            assert ROOMS.index(parts[1]) <= ROOMS.index(own), f"{own} imports {name}"
        if own in ("errors", "numbers", "files"):
            assert len(parts) < 2 or parts[0] != "efficientllm" or parts[1] in ("errors", "numbers"), f"{own}: {name}"


def test_no_circle_not_even_of_types() -> None:
    known = {module(file): file for file in FILES}
    needs = {name: {each for each in imports(file) if each in known} - {name} for name, file in known.items()}
    for name, found in needs.items():  # a package's own __init__ holds no code that its modules need
        found -= {each for each in found if name.startswith(each + ".")}
    left = dict(needs)
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def test_no_room_is_too_large() -> None:
    files = Counter(file.parent for file in FILES)
    lines: Counter[str] = Counter()
    for file in FILES:
        lines[room(file)] += len(file.read_text().splitlines())
    assert max(files.values()) <= MOST_FILES, files.most_common(3)
    assert max(lines.values()) <= MOST_LINES * lines.total(), lines.most_common(3)


def test_no_two_files_share_a_name() -> None:
    names = Counter(file.name for file in FILES if not file.name.startswith("__"))
    assert max(names.values()) == 1, names.most_common(3)


def test_every_folder_is_a_room_with_a_line_about_itself() -> None:
    for file in FILES:
        if file.name == "__init__.py" and file.parent != PACKAGE:
            assert room(file) in ROOMS
            assert ast.get_docstring(ast.parse(file.read_text())), file


@pytest.mark.parametrize("name", MATHEMATICS)
def test_mathematics_takes_tensors_and_numbers(name: str) -> None:
    found = imports(PACKAGE / f"{name}.py")
    assert not any(each.split(".")[0] in ("transformers", "logging", "rich") for each in found)
    assert not any(each.startswith(("torch.nn", "torch.optim", "torch.distributed")) for each in found)


def test_torch_distributed_is_imported_in_one_room() -> None:
    found = {room(file) for file in FILES if any(name.startswith("torch.distributed") for name in imports(file))}
    assert found == {"distributed"}


@pytest.mark.parametrize("room", ["config", "pruning.schedule", "errors", "numbers", "files"])
def test_what_a_run_is_needs_neither_torch_nor_transformers(room: str) -> None:
    place = PACKAGE / room
    names = [module(file) for file in sorted(place.glob("*.py"))] if place.is_dir() else [f"efficientllm.{room}"]
    program = f"import sys, {', '.join(names)}\nprint(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout == "[]\n"
