"""Perplexity and bits per byte of text: every token of every document, each after all that its window holds."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from efficientllm.data.tokenizing import backend_copy, encode, separator_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 2048  # most tokens that a token is predicted from: the same for all models that read as many
MOST_LOGITS = 1 << 27  # of a pass; half a GB in float32
TOGETHER = 256  # documents whose windows are sorted by length, so that little of a pass is padding


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts documents.

    Attributes:
        nats, num_tokens, num_bytes: by document: the sum of -log p over its tokens, its tokens, its UTF-8 bytes. The
            BOS (EOS where there is none) that each begins with is not predicted, and no end is.
        window: most tokens that a token was predicted from.
    """

    nats: Sequence[float]
    num_tokens: Sequence[int]
    num_bytes: Sequence[int]
    window: int

    @property
    def loss(self) -> tuple[float, float | None]:
        """Nats per token over all documents, and its standard error."""
        return ratio(self.nats, self.num_tokens)

    @property
    def perplexity(self) -> tuple[float, float | None]:
        """e to the loss; the error is that of the loss, to first order."""
        loss, error = self.loss
        value = math.exp(loss)
        return value, None if error is None else value * error

    @property
    def bits_per_byte(self) -> tuple[float, float | None]:
        """Bits per UTF-8 byte, which compares across tokenizers as perplexity does not; and its standard error."""
        nats, error = ratio(self.nats, self.num_bytes)
        return nats / math.log(2), None if error is None else error / math.log(2)


def ratio(above: Sequence[float], below: Sequence[int]) -> tuple[float, float | None]:
    """Returns Σ above / Σ below over documents, and its standard error with documents drawn independently.

    The error is the ratio estimator's, r the ratio: s² = n / (n-1) · Σ (a - r·b)² / (Σ b)². One document has none.
    """
    total = sum(below)
    value = sum(above) / total
    number = len(above)
    if number < 2:
        return value, None
    squares = sum((a - value * b) ** 2 for a, b in zip(above, below, strict=True))
    return value, math.sqrt(number / (number - 1) * squares) / total


def score_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[str],
    *,
    batch_size: int,
    advance: Callable[[int, int | None], None],
) -> TextScore:
    """Returns how well a model predicts documents; `advance` is told how many are done."""
    _, before, after = separator_ids(tokenizer, None)
    backend, first = backend_copy(tokenizer), (before or after)[0]
    window = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
    rows = min(batch_size, max(1, MOST_LOGITS // (window * model.config.vocab_size)))
    nats: list[float] = []
    num_tokens: list[int] = []
    num_bytes: list[int] = []
    texts = encode(documents, backend, [], [])
    while several := list(islice(texts, TOGETHER)):
        each = [windows([first, *ids], window) for _, ids in several]
        flat = [(number, *cut) for number, cuts in enumerate(each) for cut in cuts]
        flat.sort(key=lambda cut: len(cut[1]))
        sums = [0.0] * len(several)
        for start in range(0, len(flat), rows):
            batch = flat[start : start + rows]
            found = _nats(model, [ids for _, ids, _ in batch], [new for _, _, new in batch])
            for (number, _, _), value in zip(batch, found, strict=True):
                sums[number] += value
        nats += sums
        num_tokens += [len(ids) for _, ids in several]
        num_bytes += [len(text.encode()) for text, _ in several]
        advance(len(nats), None)
    return TextScore(nats, num_tokens, num_bytes, window)


def windows(ids: Sequence[int], window: int) -> Iterator[tuple[Sequence[int], int]]:
    """Yields (ids, how many of the last are predicted): every id but the first is, once.

    A window reads at most `window` ids; the last one reaches back as far as it may, as in lm-evaluation-harness.
    """
    for start in range(0, len(ids) - 1, window):
        end = min(start + window, len(ids) - 1)
        yield ids[max(0, end - window) : end + 1], end - start


@torch.inference_mode()
def _nats(model: "PreTrainedModel", ids: Sequence[Sequence[int]], new: Sequence[int]) -> list[float]:
    """Returns, of each row of ids, the sum of -log p over its last `new` ids; padding is on the right."""
    longest = max(len(row) for row in ids)
    batch = torch.zeros(len(ids), longest, dtype=torch.long)
    labels = torch.full_like(batch, -100)
    for number, (row, predicted) in enumerate(zip(ids, new, strict=True)):
        batch[number, : len(row)] = torch.tensor(row)
        labels[number, len(row) - predicted : len(row)] = batch[number, len(row) - predicted : len(row)]
    logits = model(input_ids=batch[:, :-1].to(model.device), use_cache=False).logits
    flat = cross_entropy(
        logits.float().flatten(0, 1), labels[:, 1:].flatten().to(model.device), reduction="none", ignore_index=-100
    )
    found: list[float] = flat.view(len(ids), -1).double().sum(dim=1).tolist()
    return found
