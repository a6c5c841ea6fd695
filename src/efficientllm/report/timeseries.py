"""Series of a run for its figures, taken from the rows of its logs."""

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from efficientllm.report.charts import Point
from efficientllm.report.history import History
from efficientllm.report.layer_plots import mean_size

SIZES = {  # fields of metrics.jsonl by what they count
    "hidden": "hidden_size",
    "FFN": "intermediate_size",
    "query heads": "num_attention_heads",
    "KV heads": "num_key_value_heads",
}


@dataclass(frozen=True)
class Validation:
    """One look at the held-out text; two may stand at one number of tokens, before and after units went at once."""

    tokens: int
    params: int
    loss: float


def validations(run: History) -> list[Validation]:
    """Returns every look at the held-out text, the source's first."""
    found = []
    for number, row in enumerate(run.rows):
        if "valid_loss" in row:
            found.append(Validation(row["tokens"], row["params"], row["valid_loss"]))
        if "removed_valid_loss" in row:  # of what one-shot methods leave, before the first step
            left = run.rows[number + 1]["params"] if number + 1 < len(run.rows) else row["params"]
            found.append(Validation(row["tokens"], left, row["removed_valid_loss"]))
    return found


def text_loss(row: Mapping[str, Any]) -> float | None:
    """Returns a step's loss on the text, a teacher's part left out; None where it was not finite, or of the source."""
    loss: float | None = row.get("ce", row["loss"])
    return loss


def training_loss(run: History, over: str = "tokens") -> list[Point]:
    """Returns (tokens, loss on the text) of every step whose loss was finite; or another field in the tokens' place."""
    losses = [(row[over], text_loss(row)) for row in run.rows]
    return [(x, loss) for x, loss in losses if loss is not None]


def logged(run: History, name: str) -> list[Point]:
    """Returns (tokens, value) of a field of metrics.jsonl, of every row that has it."""
    return [(row["tokens"], row[name]) for row in run.rows if row.get(name) is not None]


def lowest_saliencies(removals: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Returns (tokens, lowest group saliency) of every kind at each step that removed something."""
    series: dict[str, list[Point]] = {}
    seen = -1
    for row in removals:
        if row["step"] == seen:  # later ones of a step come after what has just gone
            continue
        seen = row["step"]
        for kind, saliency in row["saliencies"].items():
            series.setdefault(kind, []).append((row["tokens"], saliency))
    return series


def pruned_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Returns (tokens, share removed) of hidden dimensions, FFN channels, heads and KV heads; means over layers."""
    series = {}
    for label, name in SIZES.items():
        source = mean_size(rows[0][name])
        series[label] = [(row["tokens"], 1 - mean_size(row[name]) / source) for row in rows]
    return series


def elapsed(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns the seconds of training up to each row, without validation and checkpoints."""
    seconds = [
        (after["tokens"] - before["tokens"]) / after["tokens_per_second"] if after["tokens_per_second"] else 0.0
        for before, after in pairwise(rows)
    ]
    return list(accumulate(seconds, initial=0.0))


def tokens_at(rows: Sequence[Mapping[str, Any]], times: Sequence[float], seconds: float) -> float:
    """Returns the tokens seen after so many seconds of training; `times` are those of `elapsed`."""
    after = min(bisect_right(times, seconds), len(times) - 1)
    before = max(0, after - 1)
    span = times[after] - times[before] or 1.0
    first, last = rows[before]["tokens"], rows[after]["tokens"]
    return float(first + (last - first) * min(1.0, (seconds - times[before]) / span))


def model_config(run: History) -> dict[str, Any]:
    """Returns a config.json that says the source's layers and the head size; empty if none is found."""
    kept = [run.folder / "model", *sorted(run.folder.glob("checkpoints/step-*"))]
    for folder in [*kept, Path(run.config["model"]).expanduser()]:
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            if folder in kept and "num_hidden_layers" in found:
                found["num_hidden_layers"] += len(gone_layers(run))
            return found
    return {}


def gone_layers(run: History) -> set[int]:
    """Returns the source's layers that a run removed whole (`--method depth`)."""
    return {row["units"]["layers"] for row in run.removals if "layers" in row["units"]}


def num_layers(run: History) -> int:
    """Returns the layers of a run's model; without a config.json those that its removals name."""
    if "num_hidden_layers" in (config := model_config(run)):
        return int(config["num_hidden_layers"])
    named = (re.match(r"layers\.(\d+)\.", name) for row in run.removals for name in row["units"])
    return max((int(match[1]) + 1 for match in named if match), default=1)


def end_of_pruning(run: History) -> int:
    """Returns the tokens of the last step of the pruning phase."""
    return max((row["tokens"] for row in run.rows if row["phase"] == "prune"), default=0)
