"""Speeds side by side: what is counted, what is said, what is refused."""

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from efficientllm.cli import main
from efficientllm.delivery.bench import ROUNDS, Speed, time_rounds, verdicts
from helpers.edge import save


def speed(file_size: int, generated: float) -> Speed:
    return Speed("m", "torch", 1, 8, 4, 100.0, 0.1, generated, 1000, file_size)


@pytest.mark.parametrize(
    ("file_size", "generated", "words"),
    [
        (50, 60.0, "0.50 times the size, generates 2.00 times as fast: smaller and faster"),
        (50, 30.3, "smaller but not faster"),
        (50, 15.0, "generates 0.50 times as fast: smaller but not faster"),
        (100, 60.0, "faster but not smaller"),
        (200, 30.0, "neither smaller nor faster"),
    ],
)
def test_smaller_but_not_faster_is_said(file_size: int, generated: float, words: str) -> None:
    lines = verdicts([speed(100, 30.0), speed(file_size, generated)])
    assert len(lines) == 2 and words in lines[1]


def test_rounds_are_medians_over_the_same_tokens() -> None:
    fed: list[list[int]] = []
    waits = iter([0, 0, *[0.02, *[0.001] * 3] * (ROUNDS - 1), 0.2, *[0.1] * 3])  # the last round is an outlier

    def feed(ids: list[int]) -> None:
        fed.append(ids)
        time.sleep(next(waits))

    first, rest = time_rounds(feed, lambda: fed.append([]), 50, 16, 3)
    assert 0.02 <= first < 0.1 and 0.003 <= rest < 0.1
    rounds = fed[3:]
    length = 5  # reset, prompt, three tokens
    assert [len(ids) for ids in rounds[:length]] == [0, 16, 1, 1, 1]
    assert all(rounds[n * length : (n + 1) * length] == rounds[:length] for n in range(ROUNDS))
    assert all(0 <= number < 50 for ids in fed for number in ids)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code = main(["bench", *arguments, "--prompt", "16", "--new", "4", "--json"])
    out, error = capsys.readouterr()
    assert (code, error) == (0, "")
    return json.loads(out)


def test_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = save(tmp_path / "small", "llama")
    large = save(tmp_path / "large", "llama", intermediate_size=16_000)
    found = bench(capsys, str(tmp_path / "large"), str(tmp_path / "small"))
    for each, folder, model in zip(found, ("large", "small"), (large, small), strict=True):
        weights = 4 * sum(param.numel() for param in model.parameters())
        assert weights < each["file_size"] < weights + 10_000
        assert each["model"] == str(tmp_path / folder) and each["runtime"] == "torch"
        assert each["prompt_tokens_per_second"] == pytest.approx(16 / each["seconds_to_first_token"])
        assert each["generated_tokens_per_second"] > 0
    assert found[0]["peak_memory"] > found[1]["peak_memory"] > 50e6  # a process of its own each, with torch in it


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_every_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "m", "llama")
    for flags in (["--to", "gguf", "--type", "q8_0", "--out", "m.gguf"], ["--to", "onnx", "--out", "onnx"]):
        assert main(["export", str(tmp_path / "m"), *flags[:-1], str(tmp_path / flags[-1])]) == 0
    capsys.readouterr()
    found = bench(capsys, *(str(tmp_path / name) for name in ("m", "m.gguf", "onnx")))
    assert [each["runtime"] for each in found] == ["torch", "llama.cpp", "onnx"]
    assert found[1]["file_size"] == (tmp_path / "m.gguf").stat().st_size < found[0]["file_size"]
    assert all(each["peak_memory"] < found[0]["peak_memory"] / 2 for each in found[1:])  # no torch in them


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["MODEL is missing"]),
        ("m --runtime tensorrt", ["--runtime tensorrt", "did you mean"]),
        ("m --runtime llama.cpp", ["this model is for torch", "export --to gguf"]),
        ("m --prompt 0", ["--prompt 0"]),
        ("m --prompt 60 --new 5", ["65 tokens", "its context is 64"]),
        ("nowhere.gguf", ["nowhere.gguf", "no such file"]),
        ("./nowhere", ["no such folder"]),
    ],
)
def test_mistakes(
    arguments: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "m", "llama")
    assert main(["bench", *arguments.split()]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and all(word in error for word in words), error
