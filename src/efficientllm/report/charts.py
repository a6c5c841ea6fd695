"""Charts as numbers: where ticks, lines, labels and readings of a panel stand, in the units of its SVG.

Templates draw them. A panel is 400 units wide: two stand beside each other on a desk, one fills a phone, and text stays
readable in both.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import TypeVar

from efficientllm.report.formats import Format, decimals
from efficientllm.report.ticks import Scale, inner_ticks, log_ticks, scale, spaced, ticks

T = TypeVar("T")
Point = tuple[float, float]

WIDTH, PLOT = 400.0, 176.0  # of a panel; the height of a plot
TOP, BOTTOM, LEFT = 20.0, 38.0, 46.0  # above the plot stand readings, or a second axis; below it ticks and their title
CHARACTER = 6.6  # widest usual character of a label, in units
LINE = 13.0  # least distance of two labels
MOST_POINTS = 240  # of a line: more than a phone has pixels for, few enough for a small page
MOST_PROBES = 48  # strips of a chart that tell their values: as wide as a finger on a phone
COLUMNS = 64  # characters of a reading's line
HUES, DASHES = 8, ("", " dashed", " dotted", " dash-dotted")  # of lines that are equals: 32 that differ


@dataclass(frozen=True)
class Axis:
    """What an axis counts: its title, how its ticks are written (None: with the decimals they need), and its values."""

    title: str
    tick: Format | None
    exact: Format


@dataclass(frozen=True)
class Line:
    """A line to draw: points (x, y); its label stands at its end. `dots` also marks every point."""

    label: str
    points: Sequence[Point]
    style: str = "accent"
    dots: bool = False


@dataclass(frozen=True)
class Drawn:
    """A line in the units of the SVG; the label's `label_y` may have moved away from another's."""

    label: str
    style: str
    path: str
    dots: list[Point]
    label_x: float
    label_y: float


@dataclass(frozen=True)
class Probe:
    """A strip of the plot, from x on, and the values of the lines there, as lines of text."""

    x: float
    width: float
    text: list[str]


@dataclass(frozen=True)
class Panel:
    """One chart: a plot between (left, top) and (right, bottom), its ticks (position, text) and lines.

    Attributes:
        words: what the chart shows, for those who do not see it.
        rule: position and text of a vertical line, if there is one.
        second: ticks of the axis on top; empty without one.
    """

    title: str
    unit: str
    words: str
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Drawn]
    x_title: str
    rule: tuple[float, str] | None
    probes: list[Probe]
    second: list[tuple[float, str]]


def panel(
    title: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    log: bool = False,
    from_zero: bool = False,
    falling: bool = False,
    y_range: tuple[float, float] | None = None,
    rule: tuple[float, str] | None = None,
    second: Sequence[tuple[float, str]] = (),
) -> Panel | None:
    """Returns the chart of lines that share both axes; None if no two points stand beside each other.

    Args:
        log: a logarithmic y axis; points at or below zero are left out.
        falling: x falls from left to right.
        y_range: least and greatest y, where some points may lie outside; by default the points'.
        rule: x and text of a vertical line.
        second: marks of an axis on top: x and text.
    """
    kept = [replace(line, points=[p for p in line.points if _drawable(p, log)]) for line in lines]
    kept = [line for line in kept if line.points]
    xs = [x for line in kept for x, _ in line.points]
    if len(set(xs)) < 2:
        return None
    ys = [y for line in kept for _, y in line.points]
    low, high = y_range or (min(ys), max(ys))
    low = 0.0 if from_zero else low
    marks = log_ticks(low, high) if log else ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])
    right, bottom = WIDTH - 8 - CHARACTER * max(len(line.label) for line in kept), TOP + PLOT
    first, last = (max(xs), min(xs)) if falling else (min(xs), max(xs))
    place_x = scale(first, last, LEFT, right)
    linear = scale(math.log(low), math.log(high), bottom, TOP) if log else scale(low, high, bottom, TOP)

    def place_y(value: float) -> float:
        return linear(math.log(value) if log else value)

    x_marks = sorted((place_x(mark), (x.tick or x.exact)(mark)) for mark in inner_ticks(min(xs), max(xs)))
    return Panel(
        title=title,
        unit=y.title,
        words=_words(kept, x, y),
        height=bottom + BOTTOM,
        left=LEFT,
        right=right,
        top=TOP,
        bottom=bottom,
        x_ticks=spaced(x_marks, _room),
        y_ticks=[
            (place_y(mark), text) for mark, text in zip(marks, map(y.tick or decimals(marks), marks), strict=True)
        ],
        lines=_labelled([_draw(line, place_x, place_y) for line in kept], TOP, bottom),
        x_title=x.title,
        rule=(place_x(rule[0]), rule[1]) if rule and min(xs) < rule[0] < max(xs) else None,
        probes=_probes(kept, place_x, x, y),
        second=spaced([(place_x(at), text) for at, text in second if min(xs) <= at <= max(xs)], _room),
    )


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Returns at most `most` points: the means of as many neighbouring ones each."""
    size = math.ceil(len(points) / most) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def picked(points: Sequence[T], most: int = MOST_POINTS) -> list[T]:
    """Returns at most `most` + 1 of points or rows, evenly, the last one among them: for what falls in steps."""
    size = math.ceil(len(points) / most) or 1
    some = list(points[::size])
    return some if not points or some[-1] == points[-1] else [*some, points[-1]]


def bulk(values: Sequence[float], share: float = 0.99) -> tuple[float, float]:
    """Returns the least of the values, and the one that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[0], ordered[math.ceil(share * len(ordered)) - 1]


def style_of(number: int) -> str:
    """Returns the style of the n-th of lines that are equals: a hue, and a dash once all hues are used."""
    return f"hue{number % HUES}{DASHES[number // HUES % len(DASHES)]}"


def _room(text: str) -> float:
    return CHARACTER * (len(text) + 1.5)


def _drawable(point: Point, log: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > 0 or not log)


def _words(lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Returns what a chart shows in a sentence a line."""
    found = []
    for line in lines:
        (first, begin), (last, end) = line.points[0], line.points[-1]
        ys = [value for _, value in line.points]
        found.append(
            f"{line.label or 'From'}: {y.exact(begin)} at {x.exact(first)} {x.title}, "
            f"{y.exact(end)} at {x.exact(last)}; lowest {y.exact(min(ys))}, highest {y.exact(max(ys))}."
        )
    return " ".join(found)


def _probes(lines: Sequence[Line], place_x: Scale, x: Axis, y: Axis) -> list[Probe]:
    """Returns strips that cover the plot; a line is read in the strip that holds a point of it, at the nearest one."""
    series = [dict(line.points) for line in lines]  # of several points above each other the last one
    marked = {at for each in series if len(each) <= MOST_PROBES for at in picked(sorted(each), MOST_PROBES)}
    every = sorted({at for each in series for at in each})
    centres = sorted(marked | set(picked(every, max(2, MOST_PROBES - len(marked)))))
    edges = [centres[0], *((a + b) / 2 for a, b in pairwise(centres)), centres[-1]]
    nearest: list[list[float | None]] = [[None] * len(lines) for _ in centres]
    for n, each in enumerate(series):
        for at in each:
            strip = min(bisect_right(edges, at) - 1, len(centres) - 1)
            before = nearest[strip][n]
            if before is None or abs(at - centres[strip]) < abs(before - centres[strip]):
                nearest[strip][n] = at
    found = []
    for n, (start, end) in enumerate(pairwise(edges)):
        left, right = sorted((place_x(start), place_x(end)))
        read = [
            f"{line.label} {y.exact(each[at])}".strip()
            for line, each, at in zip(lines, series, nearest[n], strict=True)
            if at is not None
        ]
        if read:
            text = _wrapped([f"{x.exact(centres[n])} {x.title}", *read])
            found.append(Probe(round(left, 1), round(right - left, 1), text))
    return found


def _wrapped(parts: Sequence[str]) -> list[str]:
    """Returns parts side by side, in lines of at most `COLUMNS` characters."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 <= COLUMNS:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines


def _draw(line: Line, place_x: Scale, place_y: Scale) -> Drawn:
    points = [(round(place_x(x), 1), round(place_y(y), 1)) for x, y in line.points]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    x, y = points[-1]
    return Drawn(line.label, line.style, path, points if line.dots or len(points) == 1 else [], x + 6, y)


def _labelled(lines: Sequence[Drawn], top: float, bottom: float) -> list[Drawn]:
    """Returns the lines in their order, labels pushed apart so that none covers another, within the plot."""
    columns: dict[float, list[int]] = {}  # labels that stand above each other, by where their column begins
    for n in sorted(range(len(lines)), key=lambda n: lines[n].label_x):
        at = lines[n].label_x
        begin = next((x for x in columns if at - x < CHARACTER * len(lines[n].label) + 2), at)
        columns.setdefault(begin, []).append(n)
    placed: dict[int, float] = {}
    for column in columns.values():
        order = sorted(column, key=lambda n: lines[n].label_y)
        heights: list[float] = []
        for n in order:
            heights.append(max(lines[n].label_y, heights[-1] + LINE if heights else top))
        limit = bottom
        for n in reversed(range(len(heights))):
            heights[n] = min(heights[n], limit)
            limit = heights[n] - LINE
        placed |= dict(zip(order, heights, strict=True))
    return [replace(line, label_y=round(placed[n], 1)) for n, line in enumerate(lines)]
