"""Documents to token ids: the tokenizer's backend, the separator between documents, and their fingerprint."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from efficientllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATORS = ("bos", "eos", "both", "none")
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 4 << 20  # bounds the memory of one batch's encodings


def separator_ids(tokenizer: "PreTrainedTokenizerBase", separator: str | None) -> tuple[str, list[int], list[int]]:
    """(separator, ids before a document, ids after it); None means BOS if the tokenizer has one, else EOS.

    Raises:
        ConfigError: an unknown separator, or one whose token the tokenizer lacks.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if separator is None:
        separator = "eos" if bos is None else "bos"
    if separator not in SEPARATORS:
        raise ConfigError(f"document separator {separator!r} is unknown; use one of {', '.join(SEPARATORS)}")
    before = [bos] if separator in ("bos", "both") else []
    after = [eos] if separator in ("eos", "both") else []
    if None in before + after:
        has = " and ".join(n for n, token in (("BOS", bos), ("EOS", eos)) if token is not None) or "neither"
        raise ConfigError(
            f"document separator {separator!r}: of BOS and EOS the tokenizer has only {has}; use another "
            "--document-separator"
        )
    return separator, before, after


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase", separator: str | None) -> str:
    """Hash of what turns a document into tokens: vocabulary, rules and separator.

    Truncation, padding and the post-processor are left out: they are not used, and loaders change them.
    """
    description = json.loads(backend_copy(tokenizer).to_str())
    for unused in ("truncation", "padding", "post_processor"):
        description.pop(unused, None)
    _, before, after = separator_ids(tokenizer, separator)
    text = json.dumps([description, before, after], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def backend_copy(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """A copy of the `tokenizers` tokenizer inside, without truncation and padding.

    Truncation inside tokenizer.json would silently drop most of a long document.
    """
    from tokenizers import Tokenizer

    inside = getattr(tokenizer, "backend_tokenizer", None)
    if inside is None:
        raise DataError(f"{type(tokenizer).__name__} has no tokenizer.json; use a model with a fast tokenizer")
    backend = Tokenizer.from_str(inside.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def encode(
    documents: Iterable[str], backend: Any, before: list[int], after: list[int]
) -> Iterator[tuple[str, list[int]]]:
    """(text, ids with separator); a separator that a chat template already wrote is not doubled."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for batch in _batches(documents):
        for text, encoding in zip(batch, backend.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            ids = encoding.ids
            head = [] if ids[:1] == before else before
            tail = [] if ids[-1:] == after else after
            yield text, head + ids + tail


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
