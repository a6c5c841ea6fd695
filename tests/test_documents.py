"""What documents and code say of each other: links lead somewhere, cited sections exist, nothing points outside."""

import re
from pathlib import Path

import pytest

from helpers.paths import ROOT

DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
CODE = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])


def sections(document: Path) -> set[int]:
    return {int(number) for number in re.findall(r"^## (\d+)\. ", document.read_text(), re.MULTILINE)}


def cited(text: str) -> list[tuple[str, int]]:
    """Returns every `docs/NAME.md section N`, across line ends too."""
    found = re.findall(r"docs/(\w+\.md),?[\s#]+section[\s#]+(\d+)", text)
    return [(name, int(number)) for name, number in found]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    for link in links:
        if not re.match(r"https?:|#", link):
            assert (document.parent / link.partition("#")[0]).exists(), f"{document.name}: {link}"


def test_sections_that_are_cited_exist() -> None:
    citations = [(file, *each) for file in CODE for each in cited(file.read_text()) if file != Path(__file__)]
    assert len(citations) > 10
    for file, name, number in citations:
        assert number in sections(ROOT / "docs" / name), f"{file}: docs/{name} has no section {number}"
    assert sections(ROOT / "docs/method.md") == set(range(1, 12))
    linked = [link for path in DOCUMENTS for link in re.findall(r"section (\d+)\]\((\w+\.md)\)", path.read_text())]
    assert linked
    for number, name in linked:
        assert int(number) in sections(ROOT / "docs" / name), f"{name} has no section {number}"


def test_code_cites_no_document_that_is_not_here() -> None:
    for file in set(CODE) - {Path(__file__)}:
        for name in re.findall(r"docs/\w+\.md", file.read_text()):
            assert (ROOT / name).is_file(), f"{file}: {name}"
        if file.is_relative_to(ROOT / "src"):
            bare = re.findall(r"(?<![/\w])(?:method|architecture|internals|glossary)\.md", file.read_text())
            assert not bare, f"{file}: {bare[0]} without docs/"


@pytest.mark.parametrize("name", ["method.md", "architecture.md", "glossary.md", "families.md"])
def test_files_and_tests_that_documents_name_exist(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    code = "\n".join(file.read_text() for file in CODE)
    for word in re.findall(r"`([\w/]+\.py)`", text):
        assert any((folder / word).is_file() for folder in (ROOT, ROOT / "src/efficientllm")), f"{name}: {word}"
    for word in re.findall(r"`(test_\w+)`", text):
        assert f"def {word}(" in code, f"{name}: {word}"


def test_the_rooms_are_those_of_the_table() -> None:
    named = re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    folders = {path.parent.name for path in (ROOT / "src/efficientllm").glob("*/__init__.py")}
    assert set(named) == folders and len(named) == len(folders)
