"""Numbers as the page writes them."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import exp, floor, log10

Format = Callable[[float], str]

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def decimals(marks: Sequence[float]) -> Format:
    """Returns a format with as many decimals as tell evenly spaced numbers apart."""
    step = min((abs(after - before) for before, after in pairwise(marks)), default=1.0)
    digits = max(0, -floor(log10(step) + 1e-9))
    return lambda value: f"{value:.{digits}f}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def plain(value: float) -> str:
    return f"{value:.6g}"


def short(value: float) -> str:
    """Returns three digits: a learning rate, a gradient norm."""
    return f"{value:.3g}"


def loss(value: float) -> str:
    """Returns nats per token, as every chart, table and sentence of the page writes them."""
    return f"{value:.3f}"


def perplexity(nats: float) -> str:
    """Returns the perplexity of a loss in nats per token."""
    value = exp(min(nats, 700.0))  # above, no float holds it
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else scientific(value)


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def percent1(value: float) -> str:
    return f"{100 * value:.1f}%"


def byte_size(value: float) -> str:
    """Returns bytes in decimal units, in three digits or so."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} bytes" if value else "0"


def scientific(value: float, digits: int = 3) -> str:
    """Returns a number with so many digits and a power of ten: 1.86·10¹²."""
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}·10" + str(int(exponent)).translate(SUPERSCRIPTS)


def power(value: float) -> str:
    """Returns a mark of a logarithmic axis: 10⁻⁴, 2·10⁻⁴."""
    return scientific(value, 1).removeprefix("1·")


def duration(seconds: float) -> str:
    """Returns seconds as people write them: 41 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"
