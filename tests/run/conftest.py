"""Fixtures of the runs."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred documents with some structure to learn."""
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    texts = [f"Return item {n} of the list {'and the next ' * (n % 7)}or raise IndexError. " * 6 for n in range(400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
