"""Two sources to one size on the same text: what the source brings, and whether the choices hold for another one.

Their tokenizers differ, so losses compare within a source alone; `efficientllm eval --text` gives bits per byte.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from runner import Results, Run, loss_table, main
from scales import Scale

OTHER = "src/efficientllm/demo/model"  # 602,976 parameters, trained on docstrings
SIZE = {"target_params": 300_000}  # half of it
FLAGS = {
    "demo": ("the defaults", SIZE),
    "demo-ema": ("--score-ema 0.9", {**SIZE, "score_ema": 0.9}),
    "demo-all": ("--scored-layers all", {**SIZE, "scored_layers": "all"}),
    "demo-all-ema": ("--scored-layers all --score-ema 0.9", {**SIZE, "scored_layers": "all", "score_ema": 0.9}),
    "demo-quarter": ("pruning in 1/4 of the tokens", {**SIZE, "prune_tokens": 307_200}),
    "demo-quarter-all-ema": (
        "--scored-layers all --score-ema 0.9, pruning in 1/4 of the tokens",
        {**SIZE, "scored_layers": "all", "score_ema": 0.9, "prune_tokens": 307_200},
    ),
    "demo-one-shot": ("one-shot", {**SIZE, "method": "one-shot", "prune_tokens": None}),
    "demo-one-shot-obs": ("one-shot-obs", {**SIZE, "method": "one-shot-obs", "prune_tokens": None}),
    "demo-130k": ("to 130k, as stories260K", {}),
}


def runs(scale: Scale) -> Sequence[Run]:
    return [Run(name, flags, source=OTHER, seeds=2) for name, (_, flags) in FLAGS.items()]


def table(results: Results, scale: Scale) -> str:
    return loss_table(results, {name: text for name, (text, _) in FLAGS.items()}, "demo")


if __name__ == "__main__":
    main(__doc__, __file__, runs, table)
