"""The page of a run: positions of its charts, what it says, what it escapes, and how a real browser shows it."""

import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from efficientllm.cli import main
from efficientllm.config.run_config import RunConfig, dump_yaml
from efficientllm.report.charts import TOP, WIDTH, Axis, Line, panel, style_of
from efficientllm.report.figures import figures_of
from efficientllm.report.history import read_run
from efficientllm.report.layer_plots import AGES, LABELS, architecture, heat_map, unit_maps
from efficientllm.report.live import Server, followed
from efficientllm.report.multi_run import shared_figures
from efficientllm.report.samples import beginnings
from efficientllm.report.ticks import inner_ticks, log_ticks, ticks
from efficientllm.run.environment import add_start, read_starts
from helpers.chromium import CHROMIUM, Chromium
from helpers.paths import DEMO_MODEL

EVIL = "\"><img src=x onerror=alert(1)><script>alert('name')<"  # a folder's name holds no slash
TEXT = "Return item {n} of the list, or <script>alert('data')</script> if none. <b onclick=alert(1)>It is {n}.</b> "
BATCH = 512
X, Y = Axis("tokens", str, str), Axis("nats", str, str)


# --- charts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.592, 4.486), (0, 614_400), (-2.5, 1e-3), (7, 7), (0, 1e12)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8
    steps = [after - before for before, after in pairwise(found)]
    assert max(steps) == pytest.approx(min(steps))
    assert f"{steps[0]:.6e}"[0] in "125" and float(f"{steps[0]:.0e}") == pytest.approx(steps[0])


@pytest.mark.parametrize(("low", "high"), [(1.6e-7, 3.6e-7), (2e-5, 9e-5), (1e-3, 1e3), (1e-12, 1), (5e-4, 5e-4)])
def test_logarithmic_ticks_enclose(low: float, high: float) -> None:
    found = log_ticks(low, high)
    assert found[0] <= low * 1.001 and found[-1] >= high * 0.999 and 2 <= len(found) <= 8


def numbers(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path.removeprefix("M").split("L"))]


@pytest.mark.parametrize("log", [False, True])
def test_points_stand_where_the_ticks_say(log: bool) -> None:
    """Oracle: interpolation between the positions of two ticks, by their texts."""
    import math

    points = [(0.0, 3e-5), (250.0, 1.7e-4), (400.0, 9e-5), (1000.0, 4.2e-4)]
    found = panel("", [Line("", points)], X, Y, log=log)
    assert found

    def place(value: float, marks: list[tuple[float, str]], scale: Any) -> float:
        named = [(position, scale(float(text))) for position, text in marks if text]
        (start, first), (end, last) = named[0], named[-1]
        return float(start + (scale(value) - first) / (last - first) * (end - start))

    drawn = numbers(found.lines[0].path)
    for (x, y), (at_x, at_y) in zip(points, drawn, strict=True):
        assert at_x == pytest.approx(place(x, found.x_ticks, float), abs=0.06)
        assert at_y == pytest.approx(place(y, found.y_ticks, math.log if log else float), abs=0.06)
        assert found.left <= at_x <= found.right and found.top <= at_y <= found.bottom


def test_labels_keep_clear_of_each_other_and_of_the_edge() -> None:
    lines = [Line(f"line {n}", [(0, 0), (1, 1 + n / 1000)]) for n in range(6)]
    found = panel("", lines, X, Y)
    assert found
    heights = [line.label_y for line in found.lines]
    assert heights == sorted(heights, reverse=True)  # as the lines end
    assert all(below - above >= 12.9 for below, above in pairwise(heights))
    assert min(heights) >= TOP and max(heights) <= found.bottom
    assert all(line.label_x + 5.5 * len(line.label) <= WIDTH for line in found.lines)


def test_nothing_to_draw_is_no_chart() -> None:
    assert panel("", [Line("a", [])], X, Y) is None
    assert panel("", [Line("a", [(0, 1)]), Line("b", [(0, 2)])], X, Y) is None
    assert panel("", [Line("a", [(0, 0), (1, -1)])], X, Y, log=True) is None


@pytest.mark.parametrize(("low", "high"), [(0, 80_896), (1024, 80_896), (129_248, 260_032), (512, 15_360), (3, 3.001)])
def test_inner_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = inner_ticks(low, high)
    assert 3 <= len(found) <= 8 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    steps = [after - before for before, after in pairwise(found)]
    assert max(steps) == pytest.approx(min(steps)) and low > found[0] - steps[0] and high < found[-1] + steps[0]


def test_labels_of_lines_that_end_elsewhere_stay_beside_their_ends() -> None:
    ends = [Line("A", [(0, 0), (10, 5)]), Line("B", [(0, 0), (4, 5)]), Line("C", [(0, 0), (10, 5.01)])]
    found = panel("", ends, X, Y)
    assert found
    a, b, c = found.lines
    assert b.label_y == numbers(b.path)[-1][1]  # nobody stands there
    assert abs(a.label_y - c.label_y) >= 12.9


def test_an_axis_that_falls_runs_from_the_source_to_the_right() -> None:
    found = panel("", [Line("", [(260, 1.5), (200, 2.0), (130, 3.0), (130, 2.5)])], X, Y, falling=True)
    assert found
    (first, *_, before, last) = numbers(found.lines[0].path)
    assert first[0] == found.left and last[0] == before[0] == pytest.approx(found.right, abs=0.06)
    assert [float(text) for _, text in found.x_ticks] == sorted((float(t) for _, t in found.x_ticks), reverse=True)


def test_a_strip_of_a_chart_reads_the_points_within_it() -> None:
    dense = [(float(n), n / 7) for n in range(1000)]
    sparse = [(0.0, 5.0), (500.0, 6.25), (999.0, 7.0)]
    found = panel("", [Line("dense", dense), Line("sparse", sparse)], X, Y)
    assert found and 30 <= len(found.probes) <= 52
    assert found.probes[0].x == found.left
    for one, other in pairwise(found.probes):  # they cover the plot, and none stands on another
        assert other.x == pytest.approx(one.x + one.width, abs=0.11)
    assert found.probes[-1].x + found.probes[-1].width == pytest.approx(found.right, abs=0.11)
    for probe in found.probes:
        (at,), (value,) = (re.findall(words, probe.text[0]) for words in (r"^([\d.]+) tokens", r"dense ([\d.]+)"))
        assert float(value) == float(at) / 7
        left, right = (999 * (x - found.left) / (found.right - found.left) for x in (probe.x, probe.x + probe.width))
        assert left - 1 <= float(at) <= right + 1
    read = {tuple(re.findall(r"^([\d.]+) tokens.*sparse ([\d.]+)", probe.text[0])) for probe in found.probes} - {()}
    assert read == {(("0.0", "5.0"),), (("500.0", "6.25"),), (("999.0", "7.0"),)}


def test_lines_of_many_runs_differ() -> None:
    assert len({style_of(n) for n in range(26)}) == 26


# --- pictures of the model -------------------------------------------------------------------------------------------


def rectangles(path: str) -> list[tuple[float, float, float, float]]:
    """(x, y, width, height) of every part of a path."""
    found = re.findall(r"M([-\d.]+) ([-\d.]+)h([-\d.]+)v([-\d.]+)h-[\d.]+z", path)
    assert found and len(found) == path.count("z")
    return [(float(x), float(y), float(width), float(height)) for x, y, width, height in found]


FIRST = {"hidden_size": 96, "intermediate_size": 300, "num_attention_heads": 6, "num_key_value_heads": 3}


def test_the_map_of_units_shows_each_where_it_stood_and_when_it_went() -> None:
    removals = [
        {"kind": "ffn", "units": {"layers.0.ffn": 0, "layers.1.ffn": 299}},
        {"kind": "ffn", "units": {"layers.0.ffn": 1, "layers.1.ffn": 150}},
        {"kind": "kv", "units": {"layers.0.kv": 2, "layers.1.kv": 0}},
        {"kind": "query", "units": {"layers.0.query.0": 1, "layers.0.query.1": 0, "layers.1.query.2": 1}},
        {"kind": "hidden", "units": {"hidden": 48}},
    ]
    hidden, ffn, kv, query = unit_maps(removals, FIRST, 2)
    assert [each.gone for each in (hidden, ffn, kv, query)] == ["1", "2", "1", "1 to 2"]
    width = WIDTH - 20

    def cells(found: Any, layer: int) -> list[tuple[int, int, float]]:
        """(age, first unit of the cell, share of the strip's height) of a layer; the first layer is at the bottom."""
        strip = found.strips[-1 - layer][2]
        size = found.row - 1.5
        per_unit = width / found.units
        return [(age, round((x - 20) / per_unit), h / size) for age, p in strip for x, _, _, h in rectangles(p)]

    assert cells(hidden, 0) == [(4, 48, pytest.approx(1, abs=0.02))]
    assert cells(kv, 0) == [(2, 2, pytest.approx(1, abs=0.02))] and cells(kv, 1)[0][:2] == (2, 0)
    # group 0's second query head, group 1's first: heads 1 and 2 of six
    assert [unit for _, unit, _ in cells(query, 0)] == [1, 2] and [unit for _, unit, _ in cells(query, 1)] == [5]
    # 300 channels share 96 cells: 0 and 1 the first one, of three; 299 the last
    assert ffn.in_cell == 4
    assert [(age, unit) for age, unit, _ in cells(ffn, 0)] == [(0, 0), (1, 0)]
    assert sum(share for *_, share in cells(ffn, 0)) == pytest.approx(2 / 3, abs=0.02)
    assert [age for age, *_ in cells(ffn, 1)] == [0, 1] and cells(ffn, 1)[0][1] >= 296
    (first, second) = (rectangles(path)[0] for _, path in ffn.strips[-1][2])
    assert first[1] == pytest.approx(second[1] + second[3], abs=0.11)  # the later one stands on the earlier


def test_bars_are_as_long_as_the_layers_are_wide() -> None:
    last = {**FIRST, "hidden_size": 60, "intermediate_size": [300, 75, 150], "num_attention_heads": [6, 4, 2]}
    found = architecture(FIRST, last, layers=3, head_dim=16, gone=())
    assert [column.title for column in found.columns] == list(LABELS.values())
    hidden, ffn, heads, kv = found.columns
    assert (hidden.sizes, ffn.sizes) == (("96", "→ 60"), ("300", "→ 75 to 300"))
    assert (heads.sizes, kv.sizes) == (("6", "→ 2 to 6"), ("3", "as it was"))
    scale = rectangles(ffn.before)[0][2] / 300
    # top to bottom: the last layer first
    assert [w / scale for *_, w, _ in rectangles(ffn.after)] == pytest.approx([150, 75, 300], abs=0.2)
    assert [w / scale for *_, w, _ in rectangles(heads.after)] == pytest.approx([32, 64, 96], abs=0.2)
    assert [w / scale for *_, w, _ in rectangles(hidden.before)] == pytest.approx([96] * 3, abs=0.2)
    assert [w / scale for *_, w, _ in rectangles(kv.after)] == pytest.approx([48] * 3, abs=0.2)
    ends = [column.x + max(w for *_, w, _ in rectangles(column.before)) for column in found.columns]
    assert all(end < column.x for end, column in zip(ends, found.columns[1:], strict=False)) and ends[-1] <= WIDTH + 0.1
    fewer = architecture(FIRST, FIRST, layers=3, head_dim=16, gone={1})
    assert [round(w / scale) for *_, w, _ in rectangles(fewer.columns[1].after)] == [300, 0, 300]


def test_the_heat_map_is_dark_where_layers_lost_most() -> None:
    rows = [{"tokens": n, "intermediate_size": [100, 100 - 9 * n] if n else 100} for n in range(11)]
    found = heat_map("", rows, "intermediate_size", 2)
    assert found
    assert [(number, share) for number, share, _ in found.labels] == [("1", "0%"), ("2", "90%")]
    assert found.labels[0][2] > found.labels[1][2]
    levels = sorted((x, level) for level, path in found.cells for x, *_ in rectangles(path))
    assert [level for _, level in levels] == [min(AGES - 1, int(AGES * 0.09 * n)) for n in range(1, 11)]
    alike = [{"tokens": n, "hidden_size": 100 - n} for n in range(51)]
    assert [(number, share) for number, share, _ in heat_map("", alike, "hidden_size", 2).labels] == [("all", "50%")]


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        ([7, 1, 1, 1, 7, 1, 1, 7, 1, 1, 1, 1], [1, 8]),  # 7 before each document; the second one is too short
        ([1, 1, 1, 7, 1, 1, 1, 7], [0, 4]),  # 7 after each
        ([1, 1], []),
        ([7, 1, 1, 1] * 9, [1, 13, 25]),  # three of nine
    ],
)
def test_texts_begin_with_documents(tokens: list[int], starts: list[int]) -> None:
    assert beginnings(tokens, {7}, number=3, length=3) == starts


# --- the command -----------------------------------------------------------------------------------------------------


def write_run(folder: Path, *, steps: int = 30, done: bool = True, model: str = str(DEMO_MODEL)) -> Path:
    """A run folder as a run leaves it, without weights: half of its steps remove a channel a layer."""
    folder.mkdir()
    settings: dict[str, Any] = {"model": model, "data": ("<i>text</i>",), "target_params": 560_000, "out": str(folder)}
    config = RunConfig(**settings, prune_tokens=BATCH * steps, tokens=BATCH * steps, batch_tokens=BATCH, seq_len=64)
    (folder / "config.yaml").write_text(dump_yaml(config))
    rows, removals = [], []
    for step in range(steps + 1 if done else steps // 2):
        units = step // 2
        row = {"step": step, "tokens": step * BATCH, "phase": "prune", "loss": 4 - step / 100 if step else None}
        row |= {"params": 602_976 - 1152 * units, **FIRST, "intermediate_size": 256 - units, "memory_bytes": 10**8}
        row |= {"tokens_per_second": 1000.0 if step else None}
        row |= {"lr": 1e-3 / step if step else None, "grad_norm": 1 + step / 10 if step else None}
        if step % 10 == 0:
            row["valid_loss"] = 4.5 - step / 100
        if step == 7:
            row["warnings"] = ["<u>odd</u> & strange"]
        rows.append(row)
        if step and step % 2 == 0:
            removal = {"step": step, "kind": "ffn", "units": {f"layers.{n}.ffn": units for n in range(4)}}
            removal |= {"saliencies": {"ffn": 1e-5 * step, "hidden": 2e-4}, "tokens": step * BATCH}
            removals.append(removal | {"params_before": row["params"] + 1152, "params_after": row["params"]})
    for name, found in (("metrics", rows), ("removals", removals)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    if done:
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text((DEMO_MODEL / "config.json").read_text())
    return folder


class Page(HTMLParser):
    """What a page holds: tags, their attributes, its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> Page:
    """The page, once it holds nothing that a page without network and script must not."""
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert len(html.encode()) < 2_000_000
    assert not {"script", "img", "iframe", "object", "base", "form", "b", "i", "u"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "style")]
    assert [value for name, value in page.attributes if name == "href"] == ["data:,"]
    assert "url(" not in html and "@import" not in html
    return page


def test_a_run_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / EVIL)
    assert main(["report", str(run), "--no-samples"]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    page = read_page(run / "report.html")
    for words in (
        "585,696",
        "602,976",
        "4.200",
        "4.500",
        "efficientllm prune",
        EVIL,
        "<i>text</i>",
        "<u>odd</u> & strange",
    ):
        assert words in page.text, words
    assert page.tags.count("figure") == 6 and "Not finished" not in page.text
    # 15 of 256 channels gone over 30 steps: what it saved, by hand
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    attention = 12 * 4 * 6 * config["head_dim"] * 64 / 2
    each = [6 * (602_976 - 1152 * (step // 2)) + attention for step in range(30)]
    total = sum(each) * BATCH
    mantissa = f"{total:.2e}".partition("e")[0]
    assert f"{mantissa}·10" in page.text and f"{1 - sum(each) / (30 * each[0]):.0%} less" in page.text


def kinds_run(folder: Path, per_layer: bool = True) -> Path:
    """A run that loses units of every kind, layer by layer or alike in all layers."""
    run = write_run(folder)
    if per_layer:
        settings = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(settings.replace("layout: uniform", "layout: per-layer"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saliencies = {"hidden": 1e-5, "ffn": 2e-5, "kv": 3e-5, "query": 4e-5}
    removals = []
    for row in rows:
        row["hidden_size"] = 96 - row["step"] // 3
        share = row["step"] / 30
        heads, kv = [6, 6, 6 - round(3 * share), 6], [3, 3, 3, 3 - round(share)]
        ffn = [256 - row["step"], 256, 200, 256]
        if per_layer and row["step"]:
            row |= {"num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn}
        if row["step"]:
            kind = ("hidden", "ffn", "kv", "query")[row["step"] % 4]
            units = {"hidden": {"hidden": row["step"]}, "query": {"layers.1.query.0": 0}}
            each = {"step": row["step"], "tokens": row["tokens"], "kind": kind, "saliencies": saliencies}
            each |= {"units": units.get(kind, {f"layers.0.{kind}": row["step"] % 3})}
            removals.append(each | {"params_before": 1000, "params_after": 900})
    for name, found in (("metrics", rows), ("removals", removals)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return run


@pytest.mark.parametrize("per_layer", [False, True])
def test_every_chart_of_shapes_shows_all_four_kinds(tmp_path: Path, per_layer: bool) -> None:
    names = ["hidden", "FFN", "query heads", "KV heads"]
    run = read_run(kinds_run(tmp_path / "run", per_layer))
    figures = {each.name: each for each in figures_of(run)}
    for chart in figures["selection"].panels:  # saliencies, and shares: with heads and their groups alike as well
        assert sorted(line.label for line in chart.lines) == sorted(names)
    (_, picture), *_ = figures["architecture"].architectures
    assert [column.title for column in picture.columns] == names
    assert len({column.style for column in picture.columns}) == 4
    assert len(figures["architecture"].heats) == (4 if per_layer else 0)
    assert [row[0].split()[0].lower() for row in figures["architecture"].table[1:]] == ["hidden", "ffn", "query", "kv"]
    assert len(figures["units"].maps) == 4
    shared = {each.name: each for each in shared_figures([("A", run), ("B", run)])}
    assert [chart.title for chart in shared["selection"].panels] == [f"Share removed: {name}" for name in names]


def all_figures(folder: Path) -> list[Any]:
    one, two = read_run(kinds_run(folder / "one")), read_run(write_run(folder / "two", steps=40))
    return [*figures_of(one), *figures_of(two), *shared_figures([("A", one), ("B", two)])]


def test_captions_name_no_side(tmp_path: Path) -> None:
    """On a phone charts stand above each other."""
    for figure in all_figures(tmp_path):
        assert not re.search(r"\b(left|right|above|below)\b", figure.caption.lower()), figure.caption


def test_every_tick_has_its_text_and_the_last_stands_near_the_end(tmp_path: Path) -> None:
    charts = [chart for figure in all_figures(tmp_path) for chart in figure.panels]
    assert len(charts) >= 20
    for chart in charts:
        assert len(chart.x_ticks) >= 2 and all(text for _, text in (*chart.x_ticks, *chart.y_ticks)), chart.title
        assert chart.x_title in ("tokens", "parameters")
        places = [x for x, _ in chart.x_ticks]
        step = max(after - before for before, after in pairwise(places))
        assert places[0] - chart.left <= step and chart.right - places[-1] <= step, chart.title
        ends = [(x - 3 * len(text), x + 3 * len(text)) for x, text in chart.x_ticks]
        assert all(one[1] < other[0] for one, other in pairwise(ends)), chart.title


def test_speed_and_memory_stand_over_tokens_with_seconds_above(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")  # 1,000 tokens a second, 15,360 tokens
    (figure,) = (each for each in figures_of(read_run(run)) if each.name == "machine")
    for chart in figure.panels:
        begin = 512 if chart.title == "Tokens a second" else 0  # the source's row has no speed
        assert chart.x_title == "tokens"
        assert [text for _, text in chart.second] == ["0 s", "5 s", "10 s", "15 s"][begin > 0 :]
        for x, text in chart.second:
            share = (1000 * float(text.split()[0]) - begin) / (15_360 - begin)
            assert x == pytest.approx(chart.left + share * (chart.right - chart.left), abs=0.1)


def test_loss_by_size_holds_what_a_removal_at_once_cost(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[0]["removed_valid_loss"] = 6.125
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_run(run)
    (figure,) = (each for each in figures_of(found) if each.name == "loss")
    losses = {float(row[2]): int(row[1].replace(",", "")) for row in figure.table[1:]}
    assert losses == {4.5: 602_976, 6.125: rows[1]["params"], 4.4: 597_216, 4.3: 591_456, 4.2: 585_696}
    by_size = next(chart for chart in figure.panels if chart.title == "Loss by size")
    read = " ".join(line for probe in by_size.probes for line in probe.text)
    assert all(f"held out {loss}" in read for loss in ("6.125", "4.400", "4.300", "4.200"))
    assert by_size.x_title == "parameters"


def page_of(*runs: Path, out: Path) -> str:
    assert main(["report", *map(str, runs), "--out", str(out), "--no-samples"]) == 0
    read_page(out)
    return out.read_text()


def test_the_verdict_comes_first_then_warnings_then_charts_and_says_what_the_log_says(tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path / "run"), out=tmp_path / "page.html")
    places = [html.index(words) for words in ('class="verdict"', "&lt;u&gt;odd&lt;/u&gt;", "Perplexity</dt>", "<svg")]
    assert places == sorted(places) and "(step 7)" in html
    verdict = re.sub("<[^>]+>", "", html[places[0] :].partition("</p>")[0])
    found = re.search(
        r"([\d,]+) of ([\d,]+) parameters. Held-out loss ([\d.]+), ([\d.]+) nats per token below the source’s "
        r"([\d.]+); perplexity ([\d.]+) against ([\d.]+)\.",
        verdict,
    )
    assert found, verdict
    import math

    said = [float(each.replace(",", "")) for each in found.groups()]
    # the log's: 602,976 - 15 · 1,152; 4.5 and 4.2 nats
    assert said == [585_696, 602_976, 4.2, 0.3, 4.5, round(math.exp(4.2), 2), round(math.exp(4.5), 2)]


def edited(run: Path, change: Any) -> Path:
    """The run with every row of its metrics.jsonl changed in place."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_verdicts_of_other_runs(tmp_path: Path) -> None:
    def worse(row: dict[str, Any]) -> None:
        if row["step"] and "valid_loss" in row:
            row["valid_loss"] += 1.25

    out, one = tmp_path / "page.html", write_run(tmp_path / "one")
    assert "0.950 nats per token above the source’s 4.500" in page_of(edited(write_run(tmp_path / "b"), worse), out=out)
    assert "The training loss went from 3.990 to 3.700." in page_of(
        edited(write_run(tmp_path / "c"), lambda row: row.pop("valid_loss", None)), out=out
    )
    assert "So far: " in page_of(write_run(tmp_path / "d", done=False), out=out)
    both = page_of(one, tmp_path / "b", out=out)
    assert "A ends lowest: held-out loss 4.200, −0.300 against the source’s 4.500; perplexity 66.69." in both
    assert "B +1.250 (× 3.49)".replace(" ", "\N{NO-BREAK SPACE}") in both
    three = page_of(one, tmp_path / "b", write_run(tmp_path / "e", model="another"), tmp_path / "c", out=out)
    # another source by its name alone, with the same loss: it is the same text and model, moved; without a loss: not
    assert (
        "C +0.000" in three.replace("\N{NO-BREAK SPACE}", " ") and "D does not compare in loss with the others" in three
    )
    strange = edited(write_run(tmp_path / "f", model="another"), lambda row: row.update(valid_loss=5.0))
    assert "A, B do not compare in loss with each other" in page_of(one, strange, out=out)


def tables(html: str) -> dict[str, list[list[str]]]:
    """The cells of every table by the name that a screen reader says."""
    import html as escapes

    found = {}
    for name, body in re.findall(r'aria-label="([^"]*)"><table.*?>(.*?)</table>', html, re.DOTALL):
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]
        found[escapes.unescape(name)] = [[escapes.unescape(cell) for cell in row] for row in rows]
    return found


def test_the_table_of_values_is_the_log(tmp_path: Path) -> None:
    import math

    run = write_run(tmp_path / "run", steps=600)
    html = page_of(run, out=tmp_path / "page.html")
    assert len(html.encode()) < 400_000
    heads, *rows = tables(html)["logged values"]
    log = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    lowest = {
        row["step"]: row["saliencies"] for row in map(json.loads, (run / "removals.jsonl").read_text().splitlines())
    }
    assert 31 <= len(rows) <= 64 and {0, 600} <= {int(row[0]) for row in rows}
    assert sum("valid_loss" in log[int(row[0])] for row in rows) >= 30
    for row in rows:
        cell = dict(zip(heads, row, strict=True))
        logged = log[int(cell["step"])]
        for name, key, written in (
            ("tokens", "tokens", "{:,}"),
            ("parameters", "params", "{:,}"),
            ("hidden", "hidden_size", "{:,}"),
            ("FFN", "intermediate_size", "{:,}"),
            ("query heads", "num_attention_heads", "{:,}"),
            ("KV heads", "num_key_value_heads", "{:,}"),
            ("training loss", "loss", "{:.3f}"),
            ("held-out loss", "valid_loss", "{:.3f}"),
            ("learning rate", "lr", "{:.3g}"),
            ("gradient norm", "grad_norm", "{:.3g}"),
            ("tokens a second", "tokens_per_second", "{:,.0f}"),
        ):
            value = logged.get(key)
            assert cell[name] == ("–" if value is None else written.format(value)), (name, logged)
        assert cell["seconds"] == f"{logged['tokens'] / 1000:,.1f}" and cell["memory"] == "100 MB"
        if "valid_loss" in logged:
            assert float(cell["perplexity"].replace(",", "")) == pytest.approx(
                math.exp(logged["valid_loss"]), abs=0.006
            )
        saliency = lowest.get(logged["step"], {}).get("ffn")
        digits = cell["lowest saliency: FFN"].partition("·")[0]
        assert digits == ("–" if saliency is None else f"{saliency:.2e}".partition("e")[0])


def test_learning_rate_and_gradient_norm_are_drawn_and_read(tmp_path: Path) -> None:
    run = edited(write_run(tmp_path / "run"), lambda row: row.update(kl=0.5 + row["step"]) if row["step"] else None)
    (figure,) = (each for each in figures_of(read_run(run)) if each.name == "steps")
    rate, norm, distance = figure.panels
    assert [rate.title, norm.title, distance.title] == ["Learning rate", "Gradient norm", "Distance to the teacher"]
    assert rate.probes[0].text == ["512 tokens · 0.001"] and rate.unit == "× 10⁻³"
    assert norm.probes[-1].text == ["15,360 tokens · 4"] and distance.probes[-1].text == ["15,360 tokens · 30.500"]
    assert [text for _, text in rate.y_ticks] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


def test_charts_speak_and_tables_take_keys(tmp_path: Path) -> None:
    html = page_of(kinds_run(tmp_path / "run"), out=tmp_path / "page.html")
    pictures = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)">\s*<desc>([^<]+)</desc>', html)
    assert len(pictures) == html.count('role="img"') >= 16 and all(len(words) > 15 for _, words in pictures)
    held_out = "held out: 4.500 at 0 tokens, 4.200 at 15,360; lowest 4.200, highest 4.500."
    assert held_out in dict(pictures)["Loss"]
    assert html.count('<div class="scroll" tabindex="0" role="region" aria-label="') == html.count("<table") >= 5
    assert "<main>" in html and 'scope="col"' in html and 'scope="row"' in html


def test_what_next_names_the_run_as_a_shell_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import html as escapes
    import shlex

    evil = 'it\'s $(touch x) `a` <b> & "q"'
    run = write_run(tmp_path / evil, model=evil)
    out = tmp_path / "page.html"

    def commands() -> dict[str, list[str]]:
        found = [
            shlex.split(escapes.unescape(each)) for each in re.findall(r"<pre[^>]*>(.*?)</pre>", out.read_text(), re.S)
        ]
        return {words[1]: words for words in found}

    page_of(run, out=out)
    found = commands()
    assert set(found) == {"generate", "export", "eval", "compare", "prune"}
    assert found["generate"][2] == str(run / "model") and found["export"][2] == found["compare"][2] == str(run)
    assert found["eval"][2:4] == [str(run), evil] and found["prune"][2] == evil
    assert found["prune"][found["prune"].index("--out") + 1] == str(run)
    capsys.readouterr()
    assert main(found["compare"][1:]) == 0 and "585,696" in capsys.readouterr().out
    page_of(write_run(tmp_path / "other", done=False), out=out)
    assert commands()["prune"] and "--resume --out" in out.read_text()
    page_of(run, tmp_path / "other", out=out)
    both = shlex.split(escapes.unescape(re.findall(r"<pre[^>]*>(.*?)</pre>", out.read_text())[0]))
    assert both == ["efficientllm", "compare", str(run), str(tmp_path / "other")]


def test_files_and_their_sizes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    config = (run / "model/config.json").stat().st_size
    (run / "model/model.safetensors").write_bytes(bytes(1_234_567))
    (run / "checkpoints/step-00000030").mkdir(parents=True)
    (run / "checkpoints/step-00000030/a").write_bytes(bytes(2_000_000))
    html = page_of(run, out=tmp_path / "page.html")
    rows = {row[0]: row[1:] for row in tables(html)["Files"]}
    assert rows["checkpoints/"] == ["1 checkpoint: step-00000030", "2 MB"]
    assert rows["model/"][1] == f"{(1_234_567 + config) / 1e6:.3g} MB" and "1.23 MB of weights" in rows["model/"][0]
    assert "<strong>1.23 MB</strong>" in html


def test_hardware_versions_and_dates_or_that_they_are_not_recorded(tmp_path: Path) -> None:
    import torch

    run = write_run(tmp_path / "run")
    out = tmp_path / "page.html"
    assert "are not recorded" in page_of(run, out=out)
    for broken in ("{", '"text"', "[3]"):
        (run / "environment.json").write_text(broken)
        assert read_starts(run) == [] and "are not recorded" in page_of(run, out=out)
    add_start(run, 0, 1)
    add_start(run, 12, 4)
    html = page_of(run, out=out)
    assert "are not recorded" not in html and not list(run.glob(".environment*"))
    found = {row[0]: row[1:] for row in tables(html)["Date, hardware and versions"]}
    assert found[""] == ["begun", "resumed at step 12"]
    assert found["torch"] == [torch.__version__] * 2 and found["python"] == [sys.version.split()[0]] * 2
    assert f"{torch.get_num_threads()} thread" in found["hardware"][0] and found["hardware"][1].startswith(
        "4 processes"
    )
    assert found["date"] == [each["date"].replace("T", " ").replace("+00:00", " UTC") for each in read_starts(run)]
    both = page_of(run, write_run(tmp_path / "old"), out=out)
    assert tables(both)["Date, hardware and versions"][1][3] == "not recorded"


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=False)
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = read_page(tmp_path / "page.html")
    assert "Not finished: step 14 of 30, prune phase." in page.text
    assert not (run / "report.html").exists() and not (run / "samples.json").exists()


def test_runs_share_axes_and_a_table(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "<b>one</b>".replace("/", "")), write_run(tmp_path / "two", steps=60)]
    out = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--out", str(out), "--no-samples"]) == 0
    page = read_page(out)
    assert "<b>one<b>" in page.text and "568,416" in page.text and "585,696" in page.text
    losses = re.search(r'aria-label="Held-out loss".*?</svg>\s*(<text.*?)</svg>', out.read_text(), re.DOTALL)
    assert losses
    ends = [numbers(path)[-1] for path in re.findall(r'class="line [a-z0-9]+" d="([^"]+)"', losses[0])]
    assert len(ends) == 2 and ends[0][0] < ends[1][0] * 0.7  # half as many tokens, on one axis


def test_old_logs_without_memory_leave_that_chart_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    log = run / "metrics.jsonl"
    log.write_text(re.sub(r'"memory_bytes": \d+, ', "", log.read_text()))
    assert main(["report", str(run), "--no-samples"]) == 0
    html = (run / "report.html").read_text()
    assert 'aria-label="Tokens a second"' in html and 'aria-label="Memory in use"' not in html


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    empty = write_run(tmp_path / "empty")
    (empty / "metrics.jsonl").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for words, said in (
        (["report", str(tmp_path / "nowhere")], "no such folder"),
        (["report", str(tmp_path)], "no config.yaml"),
        (["report", str(empty)], "has not started"),
        (["report", str(run), str(run)], "--out is missing"),
        (["report", str(run), "--out", str(tmp_path)], "is a folder"),
        (["report", str(run), "--out", str(tmp_path / "no/where.html")], "cannot be written"),
        (["report"], "RUN is missing"),
        (["prune", "--out", str(run), "--resume", "--live", "x"], "--live x: not a port"),
        (["prune", "--out", str(run), "--resume", "--live", "65536"], "not a port"),
    ):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and said in err, err
    assert sorted(tmp_path.rglob("*")) == before


# --- live ------------------------------------------------------------------------------------------------------------


def digest(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path / "run", 0)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def ask(server: Server, method: str = "GET", path: str = "/", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_live_page_follows_and_only_reads(server: Server, tmp_path: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, waiting = ask(server)
    assert status == 200 and "not made its first step" in waiting and 'http-equiv="refresh"' in waiting
    write_run(tmp_path / "run", done=False)
    before = digest(tmp_path)
    server._fresh_until = 0.0
    _, page = ask(server)
    assert "step 14 of 30" in page and 'http-equiv="refresh" content="' in page
    with (tmp_path / "run/metrics.jsonl").open("a") as log:
        log.write('{"step": 15, "tok')  # a line that is being written
    before = digest(tmp_path)
    server._fresh_until = 0.0
    assert "step 14 of 30" in ask(server)[1]
    assert digest(tmp_path) == before
    assert ask(server, path="/../config.yaml")[0] == 404 and ask(server, "POST")[0] == 501
    assert ask(server, Host="evil.example")[0] == 403 and ask(server, Host="localhost:9")[0] == 200


def test_a_taken_port_is_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prune", str(DEMO_MODEL), "--data", "x", "--target-params", "560000", "--prune-tokens", "1Mi"]
    words += ["--tokens", "1Mi", "--out", "y", "--live", str(server.server_port)]
    assert main(words) == 2
    assert f"--live {server.server_port}: cannot serve a page" in capsys.readouterr().err
    with followed("nowhere", None):  # without --live
        assert "live page" not in capsys.readouterr().out


# --- a real run, in a real browser -----------------------------------------------------------------------------------


def arguments(folder: Path, steps: int) -> list[str]:
    model = folder / EVIL
    model.symlink_to(DEMO_MODEL)
    data = folder / "<data>.jsonl"
    data.write_text("".join(json.dumps({"text": TEXT.format(n=n) * 4}) + "\n" for n in range(400)))
    words = ["prune", str(model), "--data", str(data), "--target-params", "540000", "--lr", "1e-3"]
    words += ["--prune-tokens", str(steps // 2 * BATCH), "--tokens", str(steps * BATCH), "--seq-len", "64"]
    words += ["--batch-tokens", str(BATCH), "--valid-tokens", "2048", "--eval-every", "4"]
    return [*words, "--out", str(folder / "run <b>")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run, whose end has written its page."""
    folder = tmp_path_factory.mktemp("runs")
    words = arguments(folder, 16)
    assert main(words) == 0
    return Path(words[-1])


@pytest.mark.slow
def test_a_run_ends_with_its_page(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = read_page(finished / "report.html")
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert f"{rows[-1]['params']:,}" in page.text and f"{rows[-1]['valid_loss']:.3f}" in page.text
    assert all(row["memory_bytes"] > 10**7 for row in rows[1:])
    (start,) = read_starts(finished)
    assert start["step"] == 0 and start["versions"]["transformers"] in page.text and start["date"][:10] in page.text
    assert EVIL in page.text and "<data>.jsonl" in page.text
    samples = json.loads((finished / "samples.json").read_text())["samples"]
    assert len(samples) == 3 and "<script>alert('data')</script>" in samples[0]["prompt"] + samples[0]["reference"]
    for each in samples:
        assert each["prompt"].strip() in page.text and each["result"].strip() in page.text
    # what is kept is not made again, and makes the same page; without it source and result write the same
    kept, stamp = (finished / "report.html").read_bytes(), (finished / "samples.json").stat().st_mtime_ns
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == kept
    assert (finished / "samples.json").stat().st_mtime_ns == stamp
    (finished / "samples.json").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == kept


@pytest.mark.slow
def test_a_resumed_run_records_both_starts(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert main(["prune", "--resume", "--out", str(run), "--tokens", str(18 * BATCH)]) == 0
    first, second = read_starts(run)
    assert first == read_starts(finished)[0] and 0 < second["step"] < 16
    text = read_page(run / "report.html").text
    assert f"resumed at step {second['step']}" in text and second["date"][11:19] in text
    # a folder from before environment.json, gone on with since: its beginning is not known
    (run / "environment.json").unlink()
    assert main(["prune", "--resume", "--out", str(run), "--tokens", str(20 * BATCH)]) == 0
    assert [each["step"] > 0 for each in read_starts(run)] == [True]


@pytest.mark.slow
def test_a_broken_page_does_not_fail_the_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder in the page's place; the run is done already, so that only its page is made."""
    page, aside = finished / "report.html", finished / "aside.html"
    page.rename(aside)
    page.mkdir()
    try:
        assert main(["prune", "--resume", "--out", str(finished)]) == 0
    finally:
        page.rmdir()
        aside.rename(page)
    err = capsys.readouterr().err
    assert "warning: no report: " in err and err.count("\n") == 1
    assert not list(finished.glob(".report*"))


MEASURE = """
(() => {
  const box = element => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const colour = element => getComputedStyle(element).color;
  return {
    overflow: document.documentElement.scrollWidth - innerWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    colours: ['body', '.lead', '.prompt', 'figcaption', 'summary', '.verdict', '.note'].map(
      name => colour(document.querySelector(name))),
    labels: [...document.querySelectorAll('.label')].map(t => getComputedStyle(t).fill),
    figures: Object.fromEntries([...document.querySelectorAll('figure')].map(f => [f.className,
      [...f.querySelectorAll('.line, .after, .age, .dot')].map(box)])),
    columns: new Set([...document.querySelectorAll('figure.loss svg:not(.plot)')].map(s => box(s)[0])).size,
    svgs: [...document.querySelectorAll('.panels > div > svg')].map(box),
    texts: [...document.querySelectorAll('svg text')].filter(t => t.textContent && !t.closest('.probes')).map(
      t => [t.textContent, ...box(t), parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a]),
  };
})()
"""


DARK = {"name": "prefers-color-scheme", "value": "dark"}
READING = """[...document.querySelectorAll('.probes text')].filter(
  t => getComputedStyle(t).display != 'none').map(t => t.textContent)"""
STRIP = """(() => {  // the middle of a strip where no held-out loss stands
  const strips = [...document.querySelector('.probes').querySelectorAll('g')];
  const strip = strips.find(g => !g.textContent.includes('held out')).querySelector('path');
  strip.scrollIntoView({block: 'center'});
  const r = strip.getBoundingClientRect();
  return [(r.left + r.right) / 2, (r.top + r.bottom) / 2];
})()"""


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours `rgb(…)`."""

    def luminance(colour: str) -> float:
        parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (make test-all installs it where it can)")
def test_the_page_in_a_browser(finished: Path, tmp_path: Path) -> None:
    url = (finished / "report.html").as_uri()
    papers = set()
    with Chromium(tmp_path / "profile") as browser:
        for width, dark in ((1600, False), (1280, True), (800, False), (390, True), (360, False)):
            phone = width < 500
            browser.open(url, width, phone=phone, dark=dark, script=not phone)
            found = browser.evaluate(MEASURE)
            assert browser.requests == [url, "data:,"] or browser.requests == [url]
            shot = browser.screenshot(tmp_path / f"{width}-{dark}.png")
            assert int.from_bytes(shot[16:20]) == width and len(shot) > 50_000  # of its header: the width
            assert found["overflow"] <= 0 and found["columns"] == (1 if phone else 2)
            papers.add(found["paper"])
            assert len(set(found["labels"])) >= 4
            for colour in found["colours"] + found["labels"]:
                assert contrast(colour, found["paper"]) >= 4.5, colour
            assert set(found["figures"]) == {"loss", "selection", "architecture", "units", "steps", "machine"}
            for name, boxes in found["figures"].items():
                drawn = [box for box in boxes if max(box[2] - box[0], box[3] - box[1]) > 2]  # a line may be level
                assert len(drawn) >= 2, name
                assert any(box[2] - box[0] > 60 for box in drawn), name
            for text, left, top, right, bottom, size in found["texts"]:
                assert size >= 8.5 and left >= 0 and right <= width + 1 and bottom > top, text
        assert len(papers) == 2 and not browser.console
        # values under a pointer, without a script: a strip of the first chart tells those of the log
        assert browser.evaluate(READING) == []
        x, y = browser.evaluate(STRIP)
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        (reading,) = browser.evaluate(READING)
        rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
        assert reading in {f"{row['tokens']:,} tokens · training {row['loss']:.3f}" for row in rows[1:]}
        # on paper: ink on white, whatever the screen
        browser.call("Emulation.setEmulatedMedia", media="print", features=[DARK])
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 252, 250)"
        browser.call("Emulation.setEmulatedMedia", media="", features=[])
        # the negative control: an error on a page is heard, and a handler that is no text would run
        bad = tmp_path / "bad.html"
        bad.write_text("<img src=x: onerror='console.error(1)'><script>nothing()</script>")
        browser.open(bad.as_uri(), 390)
        assert len(browser.console) >= 2


@pytest.mark.slow
def test_a_run_followed_live_until_it_is_stopped(tmp_path: Path) -> None:
    words = [*arguments(tmp_path, 4000), "--live"]
    command = [sys.executable, "-m", "efficientllm", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout
        address = re.fullmatch(r"live page: http://127\.0\.0\.1:(\d+)/\n", process.stdout.readline())
        assert address
        page, end = "", time.monotonic() + 300
        while "Not finished: step" not in page and time.monotonic() < end:
            time.sleep(0.5)
            connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=240)
            connection.request("GET", "/")
            page = connection.getresponse().read().decode()
            assert "first step" in page or "<svg" in page
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=240)
    assert "Not finished: step" in page and process.returncode == 128 + signal.SIGTERM
    assert not (Path(words[-2]) / "report.html").exists()  # of a run that has ended
