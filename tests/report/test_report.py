"""The page of a run: positions of its charts, what it says, what it escapes, and how a real browser shows it."""

import hashlib
import http.client
import json
import os
import re
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
from efficientllm.report.charts import TOP, WIDTH, Line, log_ticks, panel, ticks
from efficientllm.report.layer_plots import AGES, architecture, heat_map, unit_maps
from efficientllm.report.live import Server, followed
from efficientllm.report.samples import beginnings
from helpers.chromium import CHROMIUM, Chromium
from helpers.paths import DEMO_MODEL

EVIL = "\"><img src=x onerror=alert(1)><script>alert('name')<"  # a folder's name holds no slash
TEXT = "Return item {n} of the list, or <script>alert('data')</script> if none. <b onclick=alert(1)>It is {n}.</b> "
BATCH = 512


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
    found = panel("", [Line("", points)], "tokens", str, str, log=log)
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
    found = panel("", lines, "tokens", str, str)
    assert found
    heights = [line.label_y for line in found.lines]
    assert heights == sorted(heights, reverse=True)  # as the lines end
    assert all(below - above >= 12.9 for below, above in pairwise(heights))
    assert min(heights) >= TOP and max(heights) <= found.bottom
    assert all(line.label_x + 5.5 * len(line.label) <= WIDTH for line in found.lines)


def test_nothing_to_draw_is_no_chart() -> None:
    assert panel("", [Line("a", [])], "tokens", str, str) is None
    assert panel("", [Line("a", [(0, 1)]), Line("b", [(0, 2)])], "tokens", str, str) is None
    assert panel("", [Line("a", [(0, 0), (1, -1)])], "tokens", str, str, log=True) is None


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
    assert [each.gone for each in (hidden, ffn, kv, query)] == [1, 2, 1, 2]
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
    assert [column.sizes for column in found.columns] == ["6 → 2 to 6", "96 → 60", "300 → 75 to 300"]
    heads, hidden, ffn = found.columns
    scale = rectangles(ffn.before)[0][2] / 300
    # top to bottom: the last layer first
    assert [w / scale for *_, w, _ in rectangles(ffn.after)] == pytest.approx([150, 75, 300], abs=0.2)
    assert [w / scale for *_, w, _ in rectangles(heads.after)] == pytest.approx([32, 64, 96], abs=0.2)
    assert [w / scale for *_, w, _ in rectangles(hidden.before)] == pytest.approx([96] * 3, abs=0.2)
    ends = [column.x + max(w for *_, w, _ in rectangles(column.before)) for column in found.columns]
    assert all(end < column.x for end, column in zip(ends, found.columns[1:], strict=False)) and ends[-1] <= WIDTH + 0.1
    fewer = architecture(FIRST, FIRST, layers=3, head_dim=16, gone={1})
    assert [round(w / scale) for *_, w, _ in rectangles(fewer.columns[2].after)] == [300, 0, 300]


def test_the_heat_map_is_dark_where_layers_lost_most() -> None:
    rows = [{"tokens": n, "intermediate_size": [100, 100 - 9 * n] if n else 100} for n in range(11)]
    found = heat_map("", rows, "intermediate_size", 2)
    assert found
    assert [(number, share) for number, share, _ in found.labels] == [("1", "0%"), ("2", "90%")]
    assert found.labels[0][2] > found.labels[1][2]
    levels = sorted((x, level) for level, path in found.cells for x, *_ in rectangles(path))
    assert [level for _, level in levels] == [min(AGES - 1, int(AGES * 0.09 * n)) for n in range(1, 11)]
    assert heat_map("", rows[:1], "intermediate_size", 2) is None  # all layers alike


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
    assert page.tags.count("figure") == 5 and "Not finished" not in page.text
    # 15 of 256 channels gone over 30 steps: what it saved, by hand
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    attention = 12 * 4 * 6 * config["head_dim"] * 64 / 2
    each = [6 * (602_976 - 1152 * (step // 2)) + attention for step in range(30)]
    total = sum(each) * BATCH
    mantissa = f"{total:.2e}".partition("e")[0]
    assert f"{mantissa}·10" in page.text and f"{1 - sum(each) / (30 * each[0]):.0%} less" in page.text


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
    ends = [numbers(path)[-1] for path in re.findall(r'class="line [a-z]+" d="([^"]+)"', losses[0])]
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
        (["report", str(empty)], "has not begun"),
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
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
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
    assert f"--live {server.server_port}: no page there" in capsys.readouterr().err
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
    colours: ['body', '.lead', '.prompt', 'figcaption', 'summary'].map(name => colour(document.querySelector(name))),
    figures: Object.fromEntries([...document.querySelectorAll('figure')].map(f => [f.className,
      [...f.querySelectorAll('.line, .after, .age, .dot')].map(box)])),
    columns: new Set([...document.querySelectorAll('figure.loss svg:not(.plot)')].map(s => box(s)[0])).size,
    svgs: [...document.querySelectorAll('.panels > div > svg')].map(box),
    texts: [...document.querySelectorAll('svg text')].filter(t => t.textContent).map(
      t => [t.textContent, ...box(t), parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a]),
  };
})()
"""


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
        for width, phone, dark in ((1280, False, False), (390, True, False), (1280, False, True), (390, True, True)):
            browser.open(url, width, phone=phone, dark=dark, script=not phone)
            found = browser.evaluate(MEASURE)
            assert browser.requests == [url, "data:,"] or browser.requests == [url]
            shot = browser.screenshot(tmp_path / f"{width}-{dark}.png")
            assert int.from_bytes(shot[16:20]) == width and len(shot) > 50_000  # of its header: the width
            assert found["overflow"] <= 0 and found["columns"] == (1 if phone else 2)
            papers.add(found["paper"])
            assert all(contrast(colour, found["paper"]) >= 4.5 for colour in found["colours"])
            assert set(found["figures"]) == {"loss", "selection", "architecture", "units", "machine"}
            for name, boxes in found["figures"].items():
                drawn = [box for box in boxes if max(box[2] - box[0], box[3] - box[1]) > 2]  # a line may be level
                assert len(drawn) >= 2, name
                assert any(box[2] - box[0] > 60 for box in drawn), name
            for text, left, top, right, bottom, size in found["texts"]:
                assert size >= 8.5 and left >= 0 and right <= width + 1 and bottom > top, text
        assert len(papers) == 2 and not browser.console
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
        page, end = "", time.monotonic() + 120
        while "Not finished: step" not in page and time.monotonic() < end:
            time.sleep(0.5)
            connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
            connection.request("GET", "/")
            page = connection.getresponse().read().decode()
            assert "first step" in page or "<svg" in page
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert "Not finished: step" in page and process.returncode == 128 + signal.SIGTERM
    assert not (Path(words[-2]) / "report.html").exists()  # of a run that has ended
