"""Runs side by side: what a run folder tells, its FLOPs, the table, what is refused."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from efficientllm.cli import main
from efficientllm.config.run_config import RunConfig
from efficientllm.models.load import empty_model, load_config
from efficientllm.planning.run_plan import read_kinds
from efficientllm.report.history import History, read_run, shape_of, step_shapes, training_flops
from efficientllm.space import find_limits, find_space
from efficientllm.space.dims import widths
from efficientllm.terminal.compare import BARS, binned, duration, spark
from helpers.paths import DEMO_MODEL

BATCH, STEPS = 128, 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ten steps, six of them pruning."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [f"Return item {n} of the list {'and the next ' * (n % 7)}or raise IndexError." for n in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = (
        f"--target-params 560k --prune-tokens {6 * BATCH} --tokens {STEPS * BATCH} --seq-len 32 --batch-tokens {BATCH}"
    )
    flags += " --valid-tokens 512 --eval-every 3 --checkpoint-every 4 --lr 1e-3"
    out = folder / "run"
    assert (
        main(["prune", str(DEMO_MODEL), "--data", str(folder / "text.jsonl"), *flags.split(), "--out", str(out)]) == 0
    )
    return out


def unfinished(run: Path, to: Path) -> Path:
    """The same run as a kill after step 5 leaves it, on a machine that has no source model."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "model")
    config = yaml.safe_load((to / "config.yaml").read_text())
    (to / "config.yaml").write_text(yaml.safe_dump({**config, "model": "/nowhere"}))
    lines = (to / "metrics.jsonl").read_text().splitlines(keepends=True)
    (to / "metrics.jsonl").write_text("".join(lines[:6]) + lines[6][:40])  # the last line was being written
    return to


def test_history(run: Path) -> None:
    history = read_run(run)
    assert history.finished and history.config["target_params"] == 560_000
    assert (history.source_params, history.tokens) == (602_976, STEPS * BATCH)
    assert history.params == history.rows[-1]["params"] <= 560_000
    assert len(history.rows) == len(history.flops or ()) == STEPS + 1
    assert [removal["kind"] for removal in history.removals] == read_kinds(str(run))
    assert [tokens for tokens, _ in history.valid_losses] == [step * BATCH for step in (0, 3, 6, 9, 10)]
    assert history.seconds == pytest.approx(sum(BATCH / row["tokens_per_second"] for row in history.rows[1:]))


def test_flops_are_those_of_the_shape_before_each_steps_removals(run: Path) -> None:
    """Against parameters counted by torch on models built at the shapes that the log names."""
    history = read_run(run)
    assert history.flops is not None
    config = load_config(str(run / "model"))
    for before, (done, now) in zip(history.rows, pairwise(history.flops), strict=False):
        config.hidden_size, config.intermediate_size = before["hidden_size"], before["intermediate_size"]
        config.num_attention_heads = before["num_attention_heads"]
        config.num_key_value_heads = before["num_key_value_heads"]
        params = sum(param.numel() for param in empty_model(config, "M").parameters())
        assert params == before["params"]
        heads = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 32 / 2
        assert now - done == BATCH * (6 * params + heads)
    assert history.rows[2]["params"] < history.rows[1]["params"]  # so that a step's own removals would show


def test_units_that_wait_for_a_tile_are_computed() -> None:
    config = load_config(str(DEMO_MODEL))
    space = find_space(empty_model(config, "M"))
    limits = find_limits(space, config, round_to=16)
    shape = {**space.shape, "ffn": space.shape["ffn"] - 17}
    shapes = [space.shape, shape, shape]
    params = [space.num_params(each) for each in shapes]
    whole = {**space.shape, "ffn": space.shape["ffn"] - 16}
    steps = [10 * space.flops_per_token(space.shape, 8), 20 * space.flops_per_token(whole, 8)]
    computed = step_shapes(shapes, params, RunConfig(target_params=params[-1]), limits)
    assert computed == [space.shape, whole]
    assert training_flops(space, [0, 10, 30], computed, 8) == [0, steps[0], sum(steps)]
    taught = training_flops(space, [0, 10, 30], computed, 8, teaching=7.0)
    assert taught == [0, steps[0] + 70, sum(steps) + 210]


def test_masks_are_computed_until_a_size_is_reached_and_what_goes_at_once_never() -> None:
    limits = find_limits(find_space(empty_model(load_config(str(DEMO_MODEL)), "M")), load_config(str(DEMO_MODEL)))
    shapes, params = [{"ffn": size} for size in (9, 8, 7, 6, 5, 5)], [90, 80, 70, 60, 50, 50]
    masks = RunConfig(method="mask-only", target_params=55, save_at=(70,))
    assert [each["ffn"] for each in step_shapes(shapes, params, masks, limits)] == [9, 9, 7, 7, 5]
    one_shot = RunConfig(method="one-shot", target_params=50)
    shapes, params = [{"ffn": size} for size in (9, 5, 5)], [90, 50, 50]
    assert [each["ffn"] for each in step_shapes(shapes, params, one_shot, limits)] == [5, 5]


def test_an_unfinished_run_needs_no_source(run: Path, tmp_path: Path) -> None:
    whole, part = read_run(run), read_run(unfinished(run, tmp_path / "part"))
    assert not part.finished and part.tokens == 5 * BATCH
    assert part.flops is not None and whole.flops is not None
    assert part.flops == whole.flops[:6]
    shutil.rmtree(tmp_path / "part/checkpoints")
    assert read_run(tmp_path / "part").flops is None  # nothing tells how many layers there were


def test_compare(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = unfinished(run, tmp_path / "part|1")
    for name in ("table.json", "table.md"):
        assert main(["compare", str(run), str(part), "--out", str(tmp_path / name)]) == 0
    shown = capsys.readouterr().out
    assert "not finished" in shown and "training loss over 1.28k tokens" in shown and BARS[-1] in shown
    first, second = json.loads((tmp_path / "table.json").read_text())
    history: History = read_run(run)
    losses = [loss for _, loss in history.valid_losses]
    assert first["valid_loss"]["source"] == losses[0] and first["valid_loss"]["last"] == losses[-1]
    assert first["valid_loss"]["best"] == min(losses[1:])
    assert first["flops"] == (history.flops or [])[-1] > second["flops"]
    assert first["config"] == history.config and not second["finished"]
    words = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    model = json.loads((run / "model/config.json").read_text())
    assert first["shape"] == {word: model[word] for word in words}
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines[:4]}) == 1  # the name's own | is escaped
    assert f"{history.params:,}" in lines[2] and lines[3].startswith(f"| {tmp_path}/part\\|1 * |")
    assert main(["compare", str(run), "--out", str(tmp_path / "table.md")]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_curves() -> None:
    points: list[tuple[int, float]] = [(0, 99.0), (10, 1.0), (20, 3.0), (100, 8.0)]
    assert binned(points, 100, 4) == [2.0, None, None, 8.0]  # the source's row is of no step
    assert spark([2.0, None, 4.9, 8.0], 2.0, 8.0) == "▁ ▄█"
    assert spark([5.0, 5.0], 5.0, 5.0) == "▁▁"
    assert [duration(seconds) for seconds in (0.2, 59.6, 185, 7620)] == ["0s", "1m00s", "3m05s", "2h07m"]


def test_shape_of_a_row() -> None:
    row: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6}
    assert shape_of({**row, "num_key_value_heads": 3}) == {"hidden": 96, "ffn": 256, "kv": 3, "query": 2}
    found = shape_of({**row, "intermediate_size": [256, 128], "num_key_value_heads": [3, 2]}, 2)
    assert widths(found) == {
        "hidden_size": 96,
        "intermediate_size": [256, 128],
        "num_attention_heads": 6,
        "num_key_value_heads": [3, 2],
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["RUN is missing"]),
        ("nowhere", ["nowhere: not a run folder (no such folder)"]),
        ("model", ["model: not a run folder", "no config.yaml and no metrics.jsonl"]),
        ("begun", ["begun: the run has not started"]),
        ("broken", ["broken/config.yaml", "unknown key 'tokenz'"]),
        ("begun --out table.csv", ["--out table.csv", "give a .md or a .json file"]),
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
    Path("model").symlink_to(DEMO_MODEL)
    for name, config in (("begun", "model: M\n"), ("broken", "tokenz: 1\n")):
        Path(name).mkdir()
        Path(name, "config.yaml").write_text(config)
        Path(name, "metrics.jsonl").touch()
    assert main(["compare", *arguments.split()]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and all(word in error for word in words), error
