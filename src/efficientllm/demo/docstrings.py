"""The demo's text: the docstrings of the running Python's standard library and its language reference."""

import ast
import hashlib
import inspect
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from efficientllm.errors import DataError

SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}
SHORTEST_DOCUMENT = 40  # characters; what is shorter is mostly "Return self." and its like
VALID_ONE_IN = 50  # documents, by hash


class Corpus(NamedTuple):
    """Two files of one `{"text": …}` a line, and what they hold together."""

    train: Path
    valid: Path
    documents: int
    characters: int


def documents() -> Iterator[str]:
    """Yields every distinct document, in an order that depends on the installed Python alone."""
    seen: set[str] = set()
    for text in (*_docstrings(Path(sysconfig.get_path("stdlib"))), *(topics[name] for name in sorted(topics))):
        document = inspect.cleandoc(text).strip()
        if len(document) >= SHORTEST_DOCUMENT and document not in seen:
            seen.add(document)
            yield document


def is_valid(document: str) -> bool:
    """Whether a document is held out, by its own hash: the same on every machine, with any other documents."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % VALID_ONE_IN == 0


def write_corpus(folder: str | Path) -> Corpus:
    """Returns the files `train.jsonl` and `valid.jsonl`, written into `folder`, which is created if need be.

    Raises:
        DataError: if this Python carries no source of its standard library.
    """
    texts = list(documents())
    # A Python with a zipped or compiled library still has its topics (some 90): no run could learn from these alone.
    if len(texts) < 1000:
        raise DataError(
            f"the demo's text comes from the .py files of the standard library, and {sysconfig.get_path('stdlib')} "
            f"has only {len(texts)} documents; use a Python that is installed with its sources"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(folder / "train.jsonl", folder / "valid.jsonl", len(texts), sum(map(len, texts)))
    with corpus.train.open("w", encoding="utf-8") as train, corpus.valid.open("w", encoding="utf-8") as valid:
        for text in texts:
            file = valid if is_valid(text) else train
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return corpus


def _docstrings(library: Path) -> Iterator[str]:
    """Yields the docstrings of every module, class and function under a folder, read without importing anything."""
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        if SKIPPED_FOLDERS.intersection(path.relative_to(library).parts[:-1]):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's sources are not ours to report
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and the like that only end in .py
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text:
                    # A lone surrogate, legal in a Python literal, has no UTF-8 form.
                    yield text.encode("utf-8", "replace").decode()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m efficientllm.demo.docstrings OUT")
    written = write_corpus(sys.argv[1])
    print(f"{written.documents} documents, {written.characters} characters: {written.train}, {written.valid}")
