"""Round numbers for the axes of charts."""

import math
from collections.abc import Callable, Sequence

Scale = Callable[[float], float]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers, about `count` of them, that enclose low and high: steps of 1, 2 or 5 times ten to n."""
    span = high - low or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def inner_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns round numbers from low to high, at least three of them where low and high differ."""
    slack = (high - low) * 1e-9
    for more in range(count, 40):
        found = [tick for tick in ticks(low, high, more) if low - slack <= tick <= high + slack]
        if len(found) > 2:
            return found
    return [low, high]


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


def spaced(marks: Sequence[tuple[float, str]], room: Callable[[str], float]) -> list[tuple[float, str]]:
    """Returns the marks (position, text) without those whose text would touch the one kept before; the last one stays.

    Args:
        room: units that a text takes.
    """
    kept: list[tuple[float, str]] = []
    for mark in reversed(marks):
        if not kept or kept[-1][0] - mark[0] >= (room(mark[1]) + room(kept[-1][1])) / 2:
            kept.append(mark)
    return kept[::-1]


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """Returns the line that puts low at start and high at end."""
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)
