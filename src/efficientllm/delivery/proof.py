"""What an export is compared on: texts for tokenizers, held-out text for logits, and what the comparison says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

TEXTS = (
    "",
    "a",
    "Once upon a time, there was a little girl named Lily.",
    " leading space, and  two   three spaces, trailing ",
    "It's what they'd've said: I'M, you'RE, we'll; don't!",
    "def f(x):\n    return x ** 2  # 3.14159e-10\n\n\n\tprint(f(1234567890))\n",
    "naïve café, Größe, Ελληνικά, Русский, العربية, हिन्दी",
    "日本語のテキスト、中文文本，한국어 텍스트",
    "emoji 🙂🚀 👩‍👩‍👧 and symbols ∑∫√ → ≠ ½ № €",
    "https://example.com/a_b-c?d=e&f=%20#g [x](y) <b>{z}</b> @user #tag $5.00 100%",
    "line one\r\nline two\n\n \n  \n",
    "MiXeD CaSe HTTPServer snake_case camelCase 0x1F 1,000,000.50",
)
ROWS, ROW_TOKENS = 2, 256
CHARACTERS = 20_000  # of text that is tokenised for the rows
WORST_RATIO = 2.0  # of perplexities; what a broken file has is far above, what 4 bits cost far below


@dataclass(frozen=True)
class Comparison:
    """How one model's logits compare with another's on the same text.

    Attributes:
        difference: largest difference, relative to the largest logit.
        perplexity, reference: per token, of the one under test and of the other.
        agreement: share of tokens where both find the same next token likeliest.
    """

    difference: float
    perplexity: float
    reference: float
    agreement: float

    def __str__(self) -> str:
        change = self.perplexity / self.reference - 1
        return (
            f"perplexity {self.perplexity:.4g} ({change:+.2%} against {self.reference:.4g}), "
            f"same most likely token {self.agreement:.1%}, largest difference {self.difference:.1e} of the largest "
            "logit"
        )


def held_out_ids(run: Path) -> list[int]:
    """Returns tokens that a run has held out of its training, if it keeps its data itself; else none."""
    for pattern in ("*/valid-*.npy", "valid/all-*.npy"):  # as data/corpus.py lays them down
        for file in sorted((run / "data").glob(pattern)):
            ids = np.load(file, mmap_mode="r", allow_pickle=False)[: ROWS * ROW_TOKENS]
            if len(ids) == ROWS * ROW_TOKENS:
                return [int(number) for number in ids]
    return []


def held_out_text() -> str:
    """Returns text that every Python carries: its own reference, by topic."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))[:CHARACTERS]


def held_out_rows(ids: Sequence[int], context: int) -> list[list[int]]:
    """Returns rows of equal length from a long text's ids, as long as the context lets them be."""
    length = max(2, min(ROW_TOKENS, context, len(ids) // ROWS))
    return [list(ids[start : start + length]) for start in range(0, ROWS * length, length)]


def compare(found: NDArray[Any], reference: NDArray[Any], rows: Sequence[Sequence[int]]) -> Comparison:
    """Returns how logits (rows, tokens, vocabulary) compare with the reference's."""
    difference = float(np.abs(found - reference).max() / max(float(np.abs(reference).max()), 1e-6))
    agreement = float((found.argmax(-1) == reference.argmax(-1)).mean())
    return Comparison(difference, _perplexity(found, rows), _perplexity(reference, rows), agreement)


def _perplexity(logits: NDArray[Any], rows: Sequence[Sequence[int]]) -> float:
    scores = torch.from_numpy(logits)[:, :-1].flatten(0, 1)
    return float(cross_entropy(scores, torch.tensor(rows)[:, 1:].flatten()).exp())
