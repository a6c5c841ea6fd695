"""The scales of the experiments: a source, text, and what all runs of a scale have in common."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pretraining:
    """How `sources.py` makes a scale's source: a Llama of these sizes and a tokenizer, trained on its text."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tokens: int
    batch_tokens: int
    lr: float


@dataclass(frozen=True)
class Scale:
    """A source, its text, and the flags that all runs have; `target` is half of the source's parameters.

    Attributes:
        name: its key in SCALES.
        source: below the folder of inputs, or how it is made.
        data, valid: text below the folder of inputs.
    """

    name: str
    source: str | Pretraining
    data: str
    valid: str
    params: int
    target: int
    prune_tokens: int
    tokens: int
    seq_len: int
    batch_tokens: int
    lr: float

    def flags(self) -> dict[str, Any]:
        """Returns the flags of `prune` at this scale, without its text."""
        return {
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


_ALL = (
    # the real model of 260 thousand parameters on the text that it was trained on: 600 steps, half of them pruning
    Scale(
        "tiny",
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
    # 8 million parameters, pretrained on all of an English text (32 million tokens of this tokenizer), then 500 steps
    Scale(
        "small",
        source=Pretraining(8192, 256, 704, 8, 8, 4, tokens=32_768_000, batch_tokens=32_768, lr=2e-3),
        data="data/english/train.jsonl.xz",
        valid="data/english/valid.jsonl.xz",
        params=7_999_744,
        target=4_000_000,
        prune_tokens=4_096_000,
        tokens=16_384_000,
        seq_len=512,
        batch_tokens=32_768,
        lr=1e-3,
    ),
    # 101 million, for a GPU
    Scale(
        "medium",
        source=Pretraining(32_768, 768, 2048, 12, 12, 4, tokens=200_000_000, batch_tokens=131_072, lr=1e-3),
        data="data/english/train.jsonl.xz",
        valid="data/english/valid.jsonl.xz",
        params=100_682_496,
        target=50_000_000,
        prune_tokens=25_000_000,
        tokens=100_000_000,
        seq_len=1024,
        batch_tokens=131_072,
        lr=6e-4,
    ),
)
SCALES = {scale.name: scale for scale in _ALL}
