"""A target in bytes, from the command line to the file that is shipped."""

import re
import shutil
from pathlib import Path

import pytest

from efficientllm.cli import main
from efficientllm.errors import ConfigError
from efficientllm.numbers import parse_bytes
from helpers.paths import DEMO_MODEL
from helpers.runs import arguments, result_bytes


@pytest.mark.parametrize(("type", "target"), [("q8_0", 400_000), ("q4_0", 350_000)])
def test_the_exported_file_is_at_or_under_the_target(
    type: str, target: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "run", tmp_path / "model.gguf"
    words = arguments(data, out, target_params=None, target_bytes=f"{target / 1000:g}kB", prune_tokens=str(14 * 512))
    assert main([*words, "--for", type]) == 0
    printed = capsys.readouterr().out
    assert f"target {target:,} bytes of {type}" in printed
    said = re.search(
        r"its \w+ file takes ([\d,]+) bytes; export it with: .* export (\S+) --to gguf --type (\S+)", printed
    )
    assert said and said.groups()[1:] == (str(out), type)
    assert main(["export", str(out), "--to", "gguf", "--type", type, "--out", str(file)]) == 0
    size = file.stat().st_size
    assert said.group(1) == f"{size:,}"
    hidden = int(re.findall(r"\(hidden_size (\d+)", printed)[-1])
    bits = {"q8_0": 34, "q4_0": 18}[type]  # bytes of a block of 32
    tile = 4 * (2 * 32 * hidden + hidden * 32) // 32 * bits
    assert target - max(target // 50, tile) <= size <= target

    # from where the decay begins, in the pruning phase, to the same bytes
    before = result_bytes(out)
    shutil.rmtree(out / "model")
    for folder in (out / "checkpoints").glob("step-*"):
        if folder.name != "step-00000011":
            shutil.rmtree(folder)
    assert main(["prune", "--resume", "--out", str(out)]) == 0
    assert "at step 11" in capsys.readouterr().out
    assert result_bytes(out) == before


def plan(*flags: str) -> int:
    return main(["plan", str(DEMO_MODEL), *flags, "--prune-tokens", "64k", "--seq-len", "64", "--batch-tokens", "512"])


def test_plan_shows_bytes_and_what_rounding_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--target-bytes", "350kB", "--for", "q4_0") == 0
    printed = capsys.readouterr().out
    (source, before), (end, after) = (
        [int(number.replace(",", "")) for number in found]
        for found in re.findall(r": ([\d,]+) parameters, ([\d,]+) bytes of q4_0", printed)
    )
    assert (source, before) == (602_976, 503_456)  # docs/edge.md: a file that llama.cpp has read
    assert 330_000 < after <= 350_000 and f"{after / 1e6:.3g} MB" in printed
    line = printed[printed.index("rounding") :]
    assert "hidden 32, ffn 32" in line
    cost, needed, held = (
        int(re.search(pattern, line).group(1).replace(",", ""))  # type: ignore[union-attr]
        for pattern in (r"about ([\d,]+) parameters below", r"take ([\d,]+) bytes", r"hold ([\d,]+) for")
    )
    assert 0 < cost < 3 * 4 * 32 * 96  # an FFN tile
    assert needed > 2 * after and held < end / 2  # 16 bits, since no row is made of blocks


def test_rounding_follows_the_type(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, tiles in (
        (("--for", "q8_0"), "hidden 32, ffn 32, kv 2"),
        (("--for", "q4_k_m"), "hidden 32, ffn 256, kv 2"),  # rows of 96 never hold a block of 256
        (("--for", "q8_0", "--round-to", "96"), "hidden 96, ffn 96, kv 6"),
    ):
        assert plan("--target-params", "500k", *flags) == 0
        printed = capsys.readouterr().out
        assert f"tiles of {tiles}:" in printed and "note: --round-to" not in printed
    assert plan("--target-params", "500k", "--for", "q8_0", "--round-to", "24") == 0
    assert "note: --round-to 24 is not a multiple of 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--target-bytes 350kB", ["--target-bytes needs --for"]),
        ("--target-bytes 350kB --target-params 300k --for q4_0", ["--target-params and --target-bytes", "give one"]),
        ("--target-bytes 350kB --for q4", ["--for q4 is not one of", "did you mean"]),
        ("--target-bytes 350k --for q4_0", ["--target-bytes: '350k'", "120MB"]),
        ("--target-bytes 60kB --for q4_0", ["--target-bytes 60k", "smallest reachable size", "embedding", "q4_0"]),
        ("--target-bytes 0 --for q4_0", ["--target-bytes 0 is below 1"]),
        ("--target-bytes 600kB --for q4_0", ["above the source's 503,456 bytes of q4_0"]),
        ("--target-bytes 350kB --for q4_0 --save-at 500k", ["--save-at 500000 counts parameters"]),
        ("--target-bytes 350kB --for q4_0 --round-to 24", ["--round-to 24 is not a multiple of 32", "bits per weight"]),
    ],
)
def test_bad_input_is_one_line(
    flags: str, words: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["plan", str(DEMO_MODEL), "--seq-len", "64"], arguments(data, tmp_path / "o", target_params=None)):
        assert main([*command, *flags.split()]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


def test_for_is_a_key_in_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("for: q4_0\ntarget-bytes: 1.5MiB\nround-to: auto\n")
    assert main(["prune", "M", "--config", str(tmp_path / "run.yaml"), "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "for_type: q4_0" in printed and "target_bytes: 1572864" in printed and "round_to: null" in printed


def test_bytes_as_people_write_them() -> None:
    known = {"120MB": 120_000_000, "1.5GiB": 3 * 2**29, "10kB": 10_000, "7": 7, "7B": 7, "1_000KiB": 1_024_000}
    assert {text: parse_bytes(text) for text in known} == known
    for text in ("120M", "8G", "MB", "ten", "120mb", ""):
        with pytest.raises(ConfigError, match="not a number of bytes"):
            parse_bytes(text)
