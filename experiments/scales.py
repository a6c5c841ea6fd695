"""The scales of the experiments: a source, text, and what all runs of a scale have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scale:
    """Paths are below the shared folder; `target` is half of the source's parameters."""

    source: str
    data: str
    valid: str
    params: int
    target: int
    prune_tokens: int
    tokens: int
    seq_len: int
    batch_tokens: int
    lr: float

    def flags(self, shared: Path) -> dict[str, Any]:
        """Returns the flags of `prune` at this scale."""
        return {
            "data": shared / self.data,
            "valid": shared / self.valid,
            "target_params": self.target,
            "prune_tokens": self.prune_tokens,
            "tokens": self.tokens,
            "seq_len": self.seq_len,
            "batch_tokens": self.batch_tokens,
            "lr": self.lr,
        }

    def removed(self, share: float) -> int:
        """Returns the size that is left when a share of the source's parameters is gone."""
        return round(self.params * (1 - share))


SCALES = {
    # the real model of 260 thousand parameters on the text that it was trained on: 600 steps, half of them pruning
    "tiny": Scale(
        source="models/stories260K",
        data="data/tinystories/train.jsonl",
        valid="data/tinystories/valid.jsonl",
        params=260_032,
        target=130_000,
        prune_tokens=614_400,
        tokens=1_228_800,
        seq_len=256,
        batch_tokens=2_048,
        lr=3e-3,
    ),
}
