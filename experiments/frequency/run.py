"""How many units go between two optimizer steps: the paper's ratios of removals to steps, at equal tokens."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from runner import Results, Run, loss_table, main
from scales import Scale

RATIOS = {
    "4:1": {"removals_per_step": 4},
    "2:1": {"removals_per_step": 2},
    "1:1": {"slot_steps": 1},
    "1:4": {"slot_steps": 4},
    "1:9": {"slot_steps": 9},
}
BUDGETS = (1, 2.5)  # times the scale's tokens; 1:9 takes the whole of the second to prune


def runs(scale: Scale) -> Sequence[Run]:
    found = []
    for factor in BUDGETS:
        for ratio, pace in RATIOS.items():
            if (ratio, factor) != ("1:9", 1):
                flags = {**pace, "prune_tokens": None, "tokens": int(scale.tokens * factor)}
                found.append(Run(name(ratio, factor), flags, seeds=1))
    return found


def name(ratio: str, factor: float) -> str:
    return f"ratio-{ratio.replace(':', 'to')}-{factor:g}x"


def table(results: Results, scale: Scale) -> str:
    names = {name(r, f): f"{r}, {f:g} × {scale.tokens / 1e6:.2f}M tokens" for f in BUDGETS for r in RATIOS}
    return loss_table(results, names)


if __name__ == "__main__":
    main(__doc__, __file__, runs, table)
