"""What the defaults rest on: saliency, scored matrices, smoothing, the stem, layout, distillation."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from runner import Results, Run, loss_table, main
from scales import Scale

CHOICES = {
    "efficientllm": ("the defaults", {}),
    "distill": ("--distill", {"distill": True}),
    "fisher": ("--saliency taylor2, squares of single rows", {"saliency": "taylor2", "micro_batch_size": 1}),
    "score-all": ("--scored-layers all", {"scored_layers": "all"}),
    "ema": ("--score-ema 0.9", {"score_ema": 0.9}),
    "no-stem": ("hidden size kept (--min-hidden 64)", {"min_hidden": 64}),
    "no-heads": ("heads kept (--min-kv 4)", {"min_kv": 4}),
    "per-layer": ("--layout per-layer", {"layout": "per-layer"}),
    "score-all-compensate": ("--scored-layers all --compensate", {"scored_layers": "all", "compensate": True}),
    "quick-all": (
        "--scored-layers all, pruning in 1/8 of the tokens",
        {"scored_layers": "all", "prune_tokens": 153_600},
    ),
    "quick-all-ema": (
        "--scored-layers all --score-ema 0.9, pruning in 1/8 of the tokens",
        {"scored_layers": "all", "prune_tokens": 153_600, "score_ema": 0.9},
    ),
    "quick-all-ema-compensate": (
        "the same with --compensate",
        {"scored_layers": "all", "prune_tokens": 153_600, "score_ema": 0.9, "compensate": True},
    ),
    "quarter-all-ema": (
        "--scored-layers all --score-ema 0.9, pruning in 1/4 of the tokens",
        {"scored_layers": "all", "prune_tokens": 307_200, "score_ema": 0.9},
    ),
    "all-ema": ("--scored-layers all --score-ema 0.9", {"scored_layers": "all", "score_ema": 0.9}),
    "quick-ema": ("--score-ema 0.9, pruning in 1/8 of the tokens", {"prune_tokens": 153_600, "score_ema": 0.9}),
    "quick-all-ema-distill": (
        "--scored-layers all --score-ema 0.9 --distill, pruning in 1/8 of the tokens",
        {"scored_layers": "all", "prune_tokens": 153_600, "score_ema": 0.9, "distill": True},
    ),
    "quarter-all-ema97": (
        "--scored-layers all --score-ema 0.97, pruning in 1/4 of the tokens",
        {"scored_layers": "all", "prune_tokens": 307_200, "score_ema": 0.97},
    ),
    "one-shot-obs-distill": (
        "--method one-shot-obs --distill, to compare with",
        {"method": "one-shot-obs", "prune_tokens": None, "distill": True},
    ),
    "score-all-per-layer": ("--scored-layers all --layout per-layer", {"scored_layers": "all", "layout": "per-layer"}),
    "score-all-distill": ("--scored-layers all --distill", {"scored_layers": "all", "distill": True}),
}


def runs(scale: Scale) -> Sequence[Run]:
    return [Run(name, flags) for name, (_, flags) in CHOICES.items()]


def table(results: Results, scale: Scale) -> str:
    return loss_table(results, {name: text for name, (text, _) in CHOICES.items()}, "efficientllm")


if __name__ == "__main__":
    main(__doc__, __file__, runs, table)
