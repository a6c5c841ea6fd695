"""A pruned model against its own shape and a hand-made one from scratch; equal tokens, equal FLOPs, 4x tokens."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from runner import Results, Run, loss_table, main
from scales import Scale

SCRATCH = {"method": "scratch", "target_params": None, "prune_tokens": None}
HAND = {**SCRATCH, "shape_of": Path(__file__).parent / "llama-130k"}  # the source with fewer layers, heads and channels
EQUAL_FLOPS = 1.221  # the pruned run's FLOPs over those of its own shape from scratch: its steps are larger at first
NAMES = {
    "efficientllm": "pruned",
    "scratch": "its shape from scratch",
    "scratch-hand": "the source's proportions from scratch",
    "scratch-equal-flops": "its shape from scratch, as many FLOPs",
    "scratch-hand-equal-flops": "the source's proportions from scratch, as many FLOPs",
    "efficientllm-4x": "pruned, 4 times the tokens",
    "scratch-4x": "its shape from scratch, 4 times the tokens",
    "scratch-hand-4x": "the source's proportions from scratch, 4 times the tokens",
}


def runs(scale: Scale) -> Sequence[Run]:
    equal, more = {"tokens": batches(scale, EQUAL_FLOPS)}, {"tokens": 4 * scale.tokens}
    return [
        Run("efficientllm"),
        Run("scratch", SCRATCH, shape_of="efficientllm"),
        Run("scratch-hand", HAND),
        Run("scratch-equal-flops", {**SCRATCH, **equal}, shape_of="efficientllm", seeds=1),
        Run("scratch-hand-equal-flops", {**HAND, **equal}, seeds=1),
        Run("efficientllm-4x", {**more, "prune_tokens": 4 * scale.prune_tokens}, seeds=1),
        Run("scratch-4x", {**SCRATCH, **more}, shape_of="efficientllm", seeds=1),
        Run("scratch-hand-4x", {**HAND, **more}, seeds=1),
    ]


def batches(scale: Scale, factor: float) -> int:
    """Returns so many times the scale's tokens, in whole batches."""
    return round(scale.tokens * factor / scale.batch_tokens) * scale.batch_tokens


def table(results: Results, scale: Scale) -> str:
    return loss_table(results, NAMES, "efficientllm")


if __name__ == "__main__":
    main(__doc__, __file__, runs, table)
