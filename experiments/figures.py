"""Pictures of the experiments, drawn with matplotlib (`pip install 'efficientllm[figures]'`), as SVG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner import Result

INK = {"hidden": "#1f5fa8", "ffn": "#222222", "kv": "#c2571a", "query": "#3a8f5c"}
LABELS = {"hidden": "hidden dimensions", "ffn": "FFN channels", "kv": "KV groups", "query": "query heads"}
COLOURS = ("#1f5fa8", "#c2571a", "#3a8f5c", "#8a4fa3", "#777777", "#b59a00")


def draw_selection(runs: Mapping[str, Result], file: Path) -> None:
    """Draws the lowest saliency of each kind and the share removed of it over tokens: the paper's figure A0."""
    plt = pyplot()
    figure, rows = plt.subplots(len(runs), 2, figsize=(9, 2.9 * len(runs)), squeeze=False)
    for axes, (title, result) in zip(rows, runs.items(), strict=True):
        end = result.removals[-1]["tokens"] / 1e6
        for kind, colour in INK.items():
            points = [
                (row["tokens"] / 1e6, row["saliencies"][kind]) for row in result.removals if kind in row["saliencies"]
            ]
            axes[0].plot(*zip(*points, strict=True), color=colour, lw=1, label=LABELS[kind])
            shares = [(row["tokens"] / 1e6, 1 - units(row, kind) / units(result.rows[0], kind)) for row in result.rows]
            axes[1].plot(*zip(*[each for each in shares if each[0] <= end], strict=True), color=colour, lw=1.2)
        axes[0].set(yscale="log", title=f"{title}: lowest saliency", xlabel="million tokens")
        axes[1].set(title="share removed", xlabel="million tokens", ylim=(-0.02, None))
        axes[0].legend(frameon=False, fontsize=8)
    save(figure, file)


def draw_losses(runs: Mapping[str, Result], file: Path, steps: int = 20) -> None:
    """Draws training loss, in means of so many steps, and held-out loss at the end of runs over tokens."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    lowest = float("inf")
    for colour, (title, result) in zip(COLOURS, runs.items(), strict=False):
        rows = [row for row in result.rows if row["loss"] is not None]
        means = [rows[n : n + steps] for n in range(0, len(rows) - steps + 1, steps)]
        losses = [sum(row.get("ce", row["loss"]) for row in each) / len(each) for each in means]
        axes.plot([each[-1]["tokens"] / 1e6 for each in means], losses, color=colour, lw=1.3, label=title)
        lowest = min(lowest, *losses)
    axes.set(xlabel="million tokens", ylabel="loss on the text, nats per token", ylim=(lowest - 0.1, lowest + 2.1))
    axes.legend(frameon=False, fontsize=8)
    save(figure, file)


def units(row: Mapping[str, Any], kind: str) -> float:
    """Returns the units of a kind that a row of metrics.jsonl has in a layer."""
    heads, kv = row["num_attention_heads"], row["num_key_value_heads"]
    return {"hidden": row["hidden_size"], "ffn": row["intermediate_size"], "kv": kv, "query": heads / kv}[kind]


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "efficientllm", "axes.spines.top": False, "axes.spines.right": False})
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None}, facecolor="white")
