"""What it chose: which kinds went when, and the shapes that were left, beside the paper's figure A0. Draws a0."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from figures import draw_selection
from runner import Result, Results, Run, main
from scales import Scale

NAMES = {
    "efficientllm": "the defaults",
    "score-all": "--scored-layers all",
    "ema": "--score-ema 0.9",
    "all-ema": "both",
    "quick-all-ema": "both, in 1/8 of the tokens",
}
KINDS = {"query": "query heads", "kv": "KV groups", "ffn": "FFN channels", "hidden": "hidden dimensions"}


def runs(scale: Scale) -> Sequence[Run]:
    flags = {
        "score-all": {"scored_layers": "all"},
        "ema": {"score_ema": 0.9},
        "all-ema": {"scored_layers": "all", "score_ema": 0.9},
        "quick-all-ema": {"scored_layers": "all", "score_ema": 0.9, "prune_tokens": scale.tokens // 8},
    }
    return [Run(name, flags.get(name, {})) for name in NAMES]


def table(results: Results, scale: Scale) -> str:
    drawn = {
        text: results[name][0] for name, text in NAMES.items() if name in ("efficientllm", "all-ema") & results.keys()
    }
    draw_selection(drawn, Path(__file__).parent / f"a0-{scale.name}.svg")
    kinds = " | ".join(KINDS.values())
    lines = [f"| run, seed | shape: hidden, FFN, heads, KV | {kinds} |", "|---|---|" + "---|" * len(KINDS)]
    for name, text in NAMES.items():
        for result in results.get(name, []):
            last = result.rows[-1]
            words = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
            shape = ", ".join(str(last[word]) for word in words)
            spans = " | ".join(span(result, kind) for kind in KINDS)
            lines.append(f"| {text}, {result.seed} | {shape} | {spans} |")
    return "Units of each kind that went, and from which to which part of the removed parameters:\n\n" + "\n".join(
        lines
    )


def span(result: Result, kind: str) -> str:
    """Returns how many units of a kind went, between which shares of all that was removed."""
    rows = [row for row in result.removals if row["kind"] == kind]
    if not rows:
        return "none"
    whole, end = result.removals[0]["params_before"], result.removals[-1]["params_after"]
    first, last = ((whole - row["params_before"]) / (whole - end) for row in (rows[0], rows[-1]))
    return f"{len(rows)}: {first:.0%} to {last:.0%}"


if __name__ == "__main__":
    main(__doc__, __file__, runs, table)
