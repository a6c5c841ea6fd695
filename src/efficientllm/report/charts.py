"""Charts as numbers: where ticks, lines and labels of a panel stand, in the units of its SVG. Templates draw them.

A panel is 400 units wide: two stand beside each other on a desk, one fills a phone, and text stays readable in both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import TypeVar

T = TypeVar("T")
Point = tuple[float, float]
Format = Callable[[float], str]

WIDTH, HEIGHT = 400.0, 220.0
TOP, BOTTOM, LEFT = 10.0, 24.0, 46.0
CHARACTER = 6.6  # widest usual character of a label, in units
LINE = 13.0  # least distance of two labels
MOST_POINTS = 240  # of a line: more than a phone has pixels for, few enough for a small page
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
STYLES = ("accent", "ink", "dashed", "dotted", "quiet")  # classes of lines, strongest first


@dataclass(frozen=True)
class Line:
    """A line to draw: points (x, y), rising in x; its label stands at its end. `dots` also marks every point."""

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
class Panel:
    """One chart: a plot between (left, top) and (right, bottom), its ticks (position, text) and lines.

    Attributes:
        rule: position and text of a vertical line, if there is one.
    """

    title: str
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


def panel(
    title: str,
    lines: Sequence[Line],
    x_title: str,
    x_format: Format,
    y_format: Format | None = None,
    *,
    log: bool = False,
    from_zero: bool = False,
    y_range: tuple[float, float] | None = None,
    rule: tuple[float, str] | None = None,
) -> Panel | None:
    """Returns the chart of lines that share both axes; None if no two points stand beside each other.

    Args:
        y_format: by default as many decimals as the ticks need.
        log: a logarithmic y axis; points at or below zero are left out.
        y_range: least and greatest y, where some points may lie outside; by default the points'.
        rule: x and text of a vertical line.
    """
    kept = [replace(line, points=[p for p in line.points if _drawable(p, log)]) for line in lines]
    kept = [line for line in kept if line.points]
    xs = [x for line in kept for x, _ in line.points]
    if len(set(xs)) < 2:
        return None
    ys = [y for line in kept for _, y in line.points]
    low, high = y_range or (min(ys), max(ys))
    if from_zero:
        low = 0.0
    marks = log_ticks(low, high) if log else ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])
    labels = max(len(line.label) for line in kept)
    right, bottom = WIDTH - 8 - CHARACTER * labels, HEIGHT - BOTTOM
    x_low, x_high = min(xs), max(xs)
    place_x = _scale(x_low, x_high, LEFT, right)
    y_scale = _scale(math.log(low), math.log(high), bottom, TOP) if log else _scale(low, high, bottom, TOP)

    def place_y(y: float) -> float:
        return y_scale(math.log(y) if log else y)

    return Panel(
        title=title,
        height=HEIGHT,
        left=LEFT,
        right=right,
        top=TOP,
        bottom=bottom,
        x_ticks=_without_last(
            [(place_x(x), x_format(x)) for x in ticks(x_low, x_high, 4) if x_low <= x <= x_high], len(x_title)
        ),
        y_ticks=[(place_y(y), text) for y, text in zip(marks, map(y_format or decimals(marks), marks), strict=True)],
        lines=_labelled([_draw(line, place_x, place_y) for line in kept], TOP, bottom),
        x_title=x_title,
        rule=(place_x(rule[0]), rule[1]) if rule and x_low < rule[0] < x_high else None,
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers, about `count` of them, that enclose low and high: steps of 1, 2 or 5 times ten to n."""
    span = high - low or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten that enclose low and high; with 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**n for n in range(first, max(last, first + 1) + 1)]
    if len(powers) > 3:
        return powers[:: math.ceil(len(powers) / 6)] if len(powers) > 6 else powers
    fine = [factor * power for power in powers for factor in (1, 2, 5)]
    begin = max(n for n, each in enumerate(fine) if each <= low * 1.0001)
    end = min(n for n, each in enumerate(fine) if each >= high * 0.9999 and n > begin)
    return fine[begin : end + 1]


def decimals(marks: Sequence[float]) -> Format:
    """Returns a format with as many decimals as tell evenly spaced numbers apart."""
    step = min((abs(after - before) for before, after in pairwise(marks)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return lambda value: f"{value:.{digits}f}"


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
    """Returns the style of the n-th of lines that are equals."""
    return STYLES[min(number, len(STYLES) - 1)]


def plain(value: float) -> str:
    return f"{value:.6g}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def megabytes(value: float) -> str:
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def scientific(value: float, digits: int = 3) -> str:
    """Returns a number with so many digits and a power of ten: 1.86·10¹²."""
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}·10" + str(int(exponent)).translate(SUPERSCRIPTS)


def power(value: float) -> str:
    """Returns a mark of a logarithmic axis: 10⁻⁴, 2·10⁻⁴."""
    return scientific(value, 1).removeprefix("1·")


def _without_last(marks: list[tuple[float, str]], title: int) -> list[tuple[float, str]]:
    """Returns ticks without the texts that would stand in the way of the axis's title of so many characters."""
    room = WIDTH - CHARACTER * (title + 1)
    return [(x, text if x + CHARACTER * len(text) / 2 < room else "") for x, text in marks]


def _drawable(point: Point, log: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > 0 or not log)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _draw(line: Line, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> Drawn:
    points = [(round(place_x(x), 1), round(place_y(y), 1)) for x, y in line.points]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    x, y = points[-1]
    return Drawn(line.label, line.style, path, points if line.dots or len(points) == 1 else [], x + 6, y)


def _labelled(lines: list[Drawn], top: float, bottom: float) -> list[Drawn]:
    """Returns the lines in their order, labels pushed apart so that none covers another, within the plot."""
    order = sorted(range(len(lines)), key=lambda n: lines[n].label_y)
    heights: list[float] = []
    for n in order:
        heights.append(max(lines[n].label_y, heights[-1] + LINE if heights else top))
    limit = bottom
    for n in reversed(range(len(heights))):
        heights[n] = min(heights[n], limit)
        limit = heights[n] - LINE
    placed = dict(zip(order, heights, strict=True))
    return [replace(line, label_y=round(placed[n], 1)) for n, line in enumerate(lines)]
