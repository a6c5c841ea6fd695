"""Pruning while training against pruning before it, and against no pruning at all: the methods that people use."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from figures import draw_losses
from runner import Results, Run, loss_table, main
from scales import Scale

METHODS = {
    "efficientllm": {},
    "one-shot": {"method": "one-shot"},
    "one-shot-all": {"method": "one-shot", "scored_layers": "all"},
    "one-shot-global": {"method": "one-shot", "allocation": "global"},
    "one-shot-obs": {"method": "one-shot-obs"},
    "magnitude": {"method": "magnitude"},
    "activation": {"method": "activation"},
    "random": {"method": "random"},
    "depth": {"method": "depth"},
}
NOT_GRADUAL = {"prune_tokens": None}
SCRATCH = {"method": "scratch", "target_params": None, "prune_tokens": None}
DRAWN = {
    "scratch": "the same shape from scratch",
    "one-shot": "pruned first (LLM-Pruner's way)",
    "one-shot-obs": "pruned first (structured OBS)",
    "efficientllm": "pruned while training, the defaults",
    "quarter-all-ema": "pruned while training, best found",
}
RATES = (0.5, 2)  # over the scale's
OBS = {"method": "one-shot-obs", **NOT_GRADUAL}


def found_flags(scale: Scale, factor: float = 1) -> dict[str, object]:
    """Returns the settings that experiments/choices found best at the tiny scale."""
    return {"scored_layers": "all", "score_ema": 0.9, "prune_tokens": int(scale.tokens * factor / 4)}


def runs(scale: Scale) -> Sequence[Run]:
    found = []
    for name, flags in METHODS.items():
        found.append(Run(name, {**flags, **(NOT_GRADUAL if flags else {})}))
    found.append(Run("scratch", SCRATCH, shape_of="efficientllm"))
    found.append(Run("one-shot-shape", {"method": "one-shot", **NOT_GRADUAL, "target_params": None}, "efficientllm"))
    found.append(Run("quarter-all-ema", found_flags(scale)))
    for rate in (scale.lr * factor for factor in RATES):
        found.append(Run(f"efficientllm-lr{rate:g}", {"lr": rate}, seeds=1))
        found.append(Run(f"one-shot-lr{rate:g}", {"method": "one-shot", **NOT_GRADUAL, "lr": rate}, seeds=1))
        found.append(Run(f"scratch-lr{rate:g}", {**SCRATCH, "lr": rate}, "efficientllm", seeds=1))
    for share in (0.3, 0.7):
        size = {"target_params": scale.removed(share)}
        found.append(Run(f"efficientllm-{share:.0%}".strip("%"), size, seeds=1))
        found.append(Run(f"one-shot-{share:.0%}".strip("%"), {"method": "one-shot", **NOT_GRADUAL, **size}, seeds=1))
        found.append(Run(f"one-shot-obs-{share:.0%}".strip("%"), {**OBS, **size}, seeds=1))
        found.append(Run(f"found-{share:.0%}".strip("%"), {**found_flags(scale), **size}, seeds=1))
    for factor in (0.25, 4):
        tokens = {"tokens": int(scale.tokens * factor)}
        pruning = {"prune_tokens": int(scale.prune_tokens * factor)}
        label = f"{factor:g}x"
        found.append(Run(f"efficientllm-{label}", {**tokens, **pruning}, seeds=1))
        found.append(Run(f"found-{label}", {**tokens, **found_flags(scale, factor)}, seeds=1))
        found.append(Run(f"one-shot-{label}", {"method": "one-shot", **NOT_GRADUAL, **tokens}, seeds=1))
        found.append(Run(f"one-shot-obs-{label}", {**OBS, **tokens}, seeds=1))
        found.append(Run(f"scratch-{label}", {**SCRATCH, **tokens}, "efficientllm", seeds=1))
    return found


def table(results: Results, scale: Scale) -> str:
    drawn = {text: results[name][0] for name, text in DRAWN.items() if name in results}
    draw_losses(drawn, Path(__file__).parent / f"losses-{scale.name}.svg")
    half = ["quarter-all-ema", *METHODS, "one-shot-shape", "scratch"]
    parts = ["Half of the parameters removed, equal tokens:", loss_table(results, {n: n for n in half}, "efficientllm")]
    rest = {name: name for name in results if name not in half}
    if rest:
        parts += ["Other rates, sizes and budgets (seed 1):", loss_table(results, rest)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main(__doc__, __file__, runs, table)
