"""The picture at the top of README.md, from runs that are kept in results/: `python experiments/overview.py`."""

import gzip
import json
from pathlib import Path
from typing import Any

from figures import pyplot, save

HERE = Path(__file__).parent
RUNS = {  # a run of in_training: its name in the picture, colour, width, and where the name stands
    "scratch": ("its shape from scratch", "#777777", 1.4, (0.36, 3.55)),
    "one-shot-obs": ("pruned first", "#c2571a", 1.4, (0.09, 2.95)),
    "quarter-all-ema": ("pruned while training", "#1f5fa8", 2.4, (0.06, 1.62)),
}
STEPS = 12  # of which a point is the mean


def main() -> None:
    plt = pyplot()
    plt.rcParams.update({"font.size": 11, "font.family": "sans-serif"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.6, 2.7), width_ratios=(2, 3))
    for name, (label, colour, width, at) in RUNS.items():
        rows = [row for row in read(name) if row["loss"] is not None]
        source = [(0, 260.032)] if name != "scratch" else []
        sizes = [*source, *((row["tokens"] / 1e6, row["params"] / 1e3) for row in rows)]
        left.plot(*zip(*sizes, strict=True), color=colour, lw=width)
        groups = [rows[n : n + STEPS] for n in range(0, len(rows) - STEPS + 1, STEPS)]
        points = [(group[-1]["tokens"] / 1e6, sum(row["loss"] for row in group) / STEPS) for group in groups]
        right.plot(*zip(*points, strict=True), color=colour, lw=width)
        right.text(*at, label, color=colour, weight="bold" if width > 2 else "normal")
    for axes, title, heights in ((left, "thousand parameters", (0, 275)), (right, "training loss", (1.5, 3.8))):
        axes.set(xlabel="million tokens", ylim=heights, xlim=(-0.02, 1.25))
        axes.set_title(title, fontsize=11, loc="left")
    save(figure, HERE / "overview.svg")


def read(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics (its first seed)."""
    with gzip.open(HERE / f"results/tiny/{name}-s1/metrics.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
