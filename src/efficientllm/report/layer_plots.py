"""What a run took from the model: widths of every layer before and after, and which units went when, as SVG numbers."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efficientllm.numbers import format_count
from efficientllm.report.charts import WIDTH, picked
from efficientllm.space.dims import KINDS

WORDS = {
    "hidden": "hidden dimensions",
    "ffn": "FFN channels",
    "query": "query heads",
    "kv": "KV heads",
    "layer": "layers",
}
LABELS = {"hidden": "hidden", "ffn": "FFN", "query": "query heads", "kv": "KV heads"}  # short words of the kinds
STYLES = {"hidden": "hue0", "FFN": "hue1", "query heads": "hue2 dashed", "KV heads": "hue3 dotted"}
AGES = 5  # shades, each of a fifth of the removals
MOST_CELLS = 96  # beside each other; more units than that share cells
ENDS = 34.0  # right of a heat map, for shares
NUMBERS = 20.0  # left of the layers, for their numbers
GAP, LEAST_COLUMN = 10.0, 82.0  # a column's title needs so much


@dataclass(frozen=True)
class Column:
    """One width of all layers: a path of bars before, one after, and what it is in words."""

    title: str
    style: str
    sizes: tuple[str, str]
    x: float
    before: str
    after: str


@dataclass(frozen=True)
class Architecture:
    """The layers as bars in proportion to their widths; the first layer is at the bottom."""

    columns: list[Column]
    layers: int
    top: float
    height: float


@dataclass(frozen=True)
class UnitMap:
    """The units of a kind in the source's order, a strip a layer: (age, path) of the parts that went.

    Attributes:
        units: of a strip.
        in_cell: units that share a cell, at most.
        gone: how many of a strip went, or the least and the most of the strips.
        strips: (layer's number from 1, or an empty text; y; paths by age), the first layer at the bottom.
    """

    title: str
    style: str
    units: int
    in_cell: int
    gone: str
    row: float
    height: float
    strips: list[tuple[str, float, list[tuple[int, str]]]]


@dataclass(frozen=True)
class HeatMap:
    """The share of a width that every layer had lost, over tokens: (age, path) of cells, darker where more was gone.

    Attributes:
        labels: (layer's number from 1, its share at the end, y).
        ends: tokens at the left and at the right.
    """

    title: str
    style: str
    row: float
    height: float
    cells: list[tuple[int, str]]
    labels: list[tuple[str, str, float]]
    ends: tuple[str, str]


def by_layer(value: int | Sequence[int], layers: int) -> list[int]:
    """Returns a size of every layer; a run of one shape logs it once, a run per layer as a list."""
    return [value] * layers if isinstance(value, int) else list(value)


def mean_size(value: int | Sequence[int]) -> float:
    """Returns a size's mean over layers."""
    return value if isinstance(value, int) else sum(value) / len(value)


def sizes_text(value: int | Sequence[int]) -> str:
    """Returns a size, or the least and the greatest one of a list."""
    least, most = (value, value) if isinstance(value, int) else (min(value), max(value))
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def architecture(
    first: Mapping[str, Any], last: Mapping[str, Any], layers: int, head_dim: int, gone: Collection[int] = ()
) -> Architecture:
    """Returns the picture of the shape in the first row of metrics.jsonl and that in the last.

    Args:
        layers: of the source.
        gone: layers that were removed whole.
    """
    named = (
        ("hidden", "hidden_size", 1),
        ("FFN", "intermediate_size", 1),
        ("query heads", "num_attention_heads", head_dim),
        ("KV heads", "num_key_value_heads", head_dim),
    )
    before = [[size * unit for size in by_layer(first[name], layers)] for _, name, unit in named]
    after = [[size * unit for size in by_layer(last[name], layers)] for _, name, unit in named]
    after = [[0 if layer in gone else size for layer, size in enumerate(sizes)] for sizes in after]
    scale = _scale([max(sizes) for sizes in before], WIDTH - NUMBERS - GAP * (len(named) - 1))
    row = min(22.0, max(2.5, 170 / layers))
    columns, x, top = [], NUMBERS, 48.0
    for (title, name, _), old, new in zip(named, before, after, strict=True):
        sizes = (sizes_text(first[name]), f"→ {sizes_text(last[name])}" if first[name] != last[name] else "as it was")
        bars = (_bars(old, x, top, row, scale), _bars(new, x, top, row, scale))
        columns.append(Column(title, STYLES[title], sizes, round(x, 1), *bars))
        x += max(LEAST_COLUMN, max(old) * scale) + GAP
    return Architecture(columns, layers, top, round(top + layers * row + 4, 1))


def unit_maps(removals: Sequence[Mapping[str, Any]], first: Mapping[str, Any], layers: int) -> list[UnitMap]:
    """Returns a map of every kind that lost units.

    Args:
        removals: rows of removals.jsonl.
        first: row of metrics.jsonl at the source's shape.
    """
    ages: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))  # by kind, strip and unit
    groups = by_layer(first["num_key_value_heads"], layers)[0]
    queries = by_layer(first["num_attention_heads"], layers)[0] // groups
    for number, row in enumerate(removals):
        age = AGES * number // len(removals)
        for name, unit in row["units"].items():
            strip = ".".join(name.split(".")[:2])  # "layers.3" of "layers.3.query.1", or "hidden"
            group = int(name.rpartition(".")[2]) if ".query." in name else 0
            ages[row["kind"]][strip][group * queries + unit] = age
    sizes = {
        "hidden": first["hidden_size"],
        "ffn": by_layer(first["intermediate_size"], layers)[0],
        "kv": groups,
        "query": groups * queries,
    }
    return [_map(kind, sizes[kind], ages[kind], layers) for kind in KINDS if ages.get(kind)]


def heat_map(title: str, rows: Sequence[Mapping[str, Any]], name: str, layers: int, style: str = "accent") -> HeatMap:
    """Returns the map of a field of metrics.jsonl that holds a size a layer, or one size for all layers."""
    if shared := isinstance(rows[-1][name], int):
        layers = 1
    source = by_layer(rows[0][name], layers)
    moments = picked(rows, MOST_CELLS - 1)
    row, right = min(16.0, max(5.0, 240 / layers)), WIDTH - ENDS
    width = (right - NUMBERS) / len(moments)
    paths: dict[int, list[str]] = defaultdict(list)
    labels = []
    for layer in range(layers):
        y = (layers - 1 - layer) * row
        for number, moment in enumerate(moments):
            gone = 1 - by_layer(moment[name], layers)[layer] / source[layer]
            if gone > 0:
                level = min(AGES - 1, int(AGES * gone))
                paths[level].append(_rect(NUMBERS + number * width, y, width + 0.2, row - 0.8))
        share = 1 - by_layer(rows[-1][name], layers)[layer] / source[layer]
        labels.append(("all" if shared else str(layer + 1), f"{100 * share:.0f}%", y))
    return HeatMap(
        title=title,
        style=style,
        row=row,
        height=round(layers * row + 20, 1),
        cells=[(level, "".join(parts)) for level, parts in sorted(paths.items())],
        labels=labels if row >= 10 else [labels[0], labels[-1]],
        ends=(format_count(moments[0]["tokens"]), f"{format_count(moments[-1]['tokens'])} tokens"),
    )


def taken(removals: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float]]:
    """Returns of every kind: its name in words, the parameters that went with its units, and their share of all."""
    params = dict.fromkeys(LABELS, 0)
    for row in removals:
        params[row["kind"]] = params.get(row["kind"], 0) + row["params_before"] - row["params_after"]
    total = sum(params.values()) or 1
    words = WORDS | {"kv": "KV heads, with their query heads"}
    return [(words[kind], number, number / total) for kind, number in params.items()]


def _map(kind: str, units: int, ages: Mapping[str, Mapping[int, int]], layers: int) -> UnitMap:
    cells = min(units, MOST_CELLS)
    names = [f"layers.{layer}" for layer in reversed(range(layers))] if kind != "hidden" else ["hidden"]
    row = min(16.0, max(5.0, 200 / len(names))) if kind != "hidden" else 26.0
    width = (WIDTH - NUMBERS) / cells
    strips = []
    for number, name in enumerate(names):
        gone = ages.get(name, {})
        label = "" if kind == "hidden" else str(layers - number)
        y = number * row
        strips.append((label if number in (0, len(names) - 1) else "", y, _strip(gone, units, cells, width, y, row)))
    return UnitMap(
        title=WORDS[kind],
        style=STYLES[LABELS[kind]],
        units=units,
        in_cell=-(-units // cells),
        gone=sizes_text([len(ages.get(name, {})) for name in names]),
        row=row,
        height=round(row * len(names) + 2, 1),
        strips=strips,
    )


def _strip(
    gone: Mapping[int, int], units: int, cells: int, width: float, y: float, row: float
) -> list[tuple[int, str]]:
    """Returns a path for every age: in each cell the share of its units that went then, stacked from the bottom."""
    paths: dict[int, list[str]] = defaultdict(list)
    full = row - 1.5
    for cell in range(cells):
        inside = range(cell * units // cells, (cell + 1) * units // cells)
        counts = [sum(gone.get(unit) == age for unit in inside) for age in range(AGES)]
        floor = y + full
        for age, count in enumerate(counts):
            if count:
                height = full * count / len(inside)
                floor -= height
                paths[age].append(_rect(NUMBERS + cell * width, floor, width - min(1.0, width / 4), height))
    return [(age, "".join(parts)) for age, parts in sorted(paths.items())]


def _bars(sizes: Sequence[int], x: float, top: float, row: float, scale: float) -> str:
    gap = 1.0 if row > 4 else 0.4
    rows = enumerate(reversed(sizes))
    return "".join(_rect(x, top + number * row, size * scale, row - gap) for number, size in rows)


def _rect(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"


def _scale(widths: Sequence[int], room: float) -> float:
    """Returns units of the SVG for one of width, such that columns fit beside each other with room for their titles."""
    wide = list(widths)
    while True:
        scale = (room - LEAST_COLUMN * (len(widths) - len(wide))) / sum(wide)
        fitting = [width for width in wide if width * scale >= LEAST_COLUMN]
        if len(fitting) in (len(wide), 0):
            return scale
        wide = fitting
