"""Variant A against variant B (second-order updates), and how tokens are best split between pruning and training."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from runner import Results, Run, loss_table, main
from scales import Scale

SPLITS = (0.03, 0.125, 0.25, 0.75)


def runs(scale: Scale) -> Sequence[Run]:
    found = [Run("efficientllm"), Run("compensate", {"compensate": True})]
    for share in SPLITS:
        pace = {"prune_tokens": int(scale.tokens * share)}
        found.append(Run(f"prune-{share:g}", pace))
        found.append(Run(f"prune-{share:g}-compensate", {**pace, "compensate": True}))
    return found


def table(results: Results, scale: Scale) -> str:
    names = {"efficientllm": "A, pruning in 0.5 of the tokens", "compensate": "B, pruning in 0.5 of the tokens"}
    for share in SPLITS:
        names[f"prune-{share:g}"] = f"A, in {share:g}"
        names[f"prune-{share:g}-compensate"] = f"B, in {share:g}"
    return loss_table(results, names, "efficientllm")


if __name__ == "__main__":
    main(__doc__, __file__, runs, table)
