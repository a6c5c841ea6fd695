"""Token shards on disk: text made to token ids once, then read at random without loading them.

A folder holds `train-00000.npy …`, `valid-00000.npy …` (one-dimensional, uint16 or uint32, at most 64Mi tokens each)
and `index.json`. Documents follow each other, each with its separator; rows may span documents.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from efficientllm.data.documents import DataSource, read_documents
from efficientllm.data.shards import Rows, ShardWriter, open_shard
from efficientllm.data.tokenizing import BATCH_DOCUMENTS, backend_copy, encode, separator_ids, tokenizer_fingerprint
from efficientllm.errors import ConfigError, DataError
from efficientllm.files import staging, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rows", "Split", "TokenFolder", "is_prepared", "open_tokens", "prepare", "tokenizer_fingerprint"]

VERSION = 1
HELD_OUT = 0.005  # of the documents
HELD_OUT_TOKENS = 1_000_000

Split = Literal["train", "valid", "all"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenFolder:
    """A folder of token shards and what its index says."""

    path: Path
    spec: str  # what the user called it
    fingerprint: str  # of tokenizer and separator
    separator: str
    dtype: str  # uint16, uint32
    tokens: int  # of the split train
    valid_tokens: int
    documents: int  # of both splits
    sha256: str  # of the tokens of both splits
    sources: tuple[str, ...]
    shards: dict[str, list[int]]  # tokens of each shard, by split

    def rows(self, seq_len: int, split: Split = "train") -> Rows:
        """Random access to the rows of a split (`all`: train, then valid), memory-mapped."""
        names = ("train", "valid") if split == "all" else (split,)
        return Rows([open_shard(self.path, name, n) for name in names for n in range(len(self.shards[name]))], seq_len)


def is_prepared(path: Path) -> bool:
    """Whether a folder holds token shards rather than text."""
    return (path / "index.json").is_file() and any(path.glob("*-00000.npy"))


def prepare(
    sources: Sequence[DataSource],
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    *,
    text_field: str = "text",
    txt_split: str = "file",
    document_separator: str | None = None,
    hold_out: bool = True,
    progress: Progress | None = None,
) -> TokenFolder:
    """Tokenises the sources, one after the other, into a new folder of shards.

    With `hold_out`, 0.5% of the documents, chosen by a hash of their text, become the split valid (at most 1M tokens);
    if none was chosen, the last of at least two documents does. A held-out text that comes again stays out of train.
    `progress` is called with the documents and tokens so far. On any error nothing is left behind.

    Raises:
        ConfigError: the separator does not fit the tokenizer.
        DataError: `out` exists or cannot be written, or a source cannot be read.
    """
    if os.path.lexists(out):
        raise DataError(f"output folder {out} exists; choose another or remove it")
    separator, before, after = separator_ids(tokenizer, document_separator)
    backend = backend_copy(tokenizer)
    largest = max([*backend.get_vocab(with_added_tokens=True).values(), *before, *after])
    dtype = "uint16" if largest < 1 << 16 else "uint32"
    documents = (
        text
        for source in sources
        for text in read_documents(source, text_field=text_field, txt_split=txt_split, tokenizer=tokenizer)
    )
    try:
        with staging(out) as partial:
            writers = {name: ShardWriter(partial, name, dtype) for name in ("train", "valid")}
            encoded = encode(documents, backend, before, after)
            count = _write_splits(encoded, writers["train"], writers["valid"], hold_out, progress)
            for writer in writers.values():
                writer.close()
            index = {
                "version": VERSION,
                "fingerprint": tokenizer_fingerprint(tokenizer, separator),
                "separator": separator,
                "dtype": dtype,
                "tokens": writers["train"].tokens,
                "valid_tokens": writers["valid"].tokens,
                "documents": count,
                "sha256": hashlib.sha256(b"".join(w.digest.digest() for w in writers.values())).hexdigest(),
                "sources": [source.spec for source in sources],
                "shards": {name: writer.shards for name, writer in writers.items()},
            }
            write_whole(partial / "index.json", json.dumps(index, indent=2) + "\n")
            out.parent.mkdir(parents=True, exist_ok=True)
            partial.rename(out)
    except OSError as error:
        raise DataError(
            f"output folder {out}: cannot be written ({error.strerror or error}); free up space or choose another"
        ) from None
    return open_tokens(out, spec=", ".join(source.spec for source in sources))


def open_tokens(path: Path, tokenizer: "PreTrainedTokenizerBase | None" = None, spec: str | None = None) -> TokenFolder:
    """The folder of token shards at `path`, checked; `spec` is what messages call it (default: the path).

    Raises:
        DataError: not a prepared folder, incomplete, truncated, or made by another tokenizer than the one given.
    """
    again = "run efficientllm prepare again"
    try:
        index = json.loads((path / "index.json").read_text())
        if index.pop("version") != VERSION:
            raise DataError(f"token folder {path}: written by another version of efficientllm; {again}")
        index["sources"] = tuple(index["sources"])
        folder = TokenFolder(path=path, spec=spec or str(path), **index)
        for split, sizes in folder.shards.items():
            for number, size in enumerate(sizes):
                found = open_shard(path, split, number)
                if found.shape != (size,) or found.dtype != np.dtype(folder.dtype):
                    raise ValueError(f"{split}-{number:05d}.npy has shape {found.shape}, not ({size},)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise DataError(
            f"token folder {path}: token shards are missing, truncated or invalid ({error}); {again}"
        ) from None
    if tokenizer is not None:
        try:
            expected = tokenizer_fingerprint(tokenizer, folder.separator)
        except ConfigError:
            expected = ""  # it lacks the separator
        if expected != folder.fingerprint:
            raise DataError(
                f"token folder {path}: made with another tokenizer (fingerprint {folder.fingerprint[:12]}, "
                f"the model's {expected[:12] or 'lacks the separator'}); {again} with --tokenizer set to the model"
            )
    return folder


def _write_splits(
    encoded: Iterable[tuple[str, list[int]]],
    train: ShardWriter,
    valid: ShardWriter,
    hold_out: bool,
    progress: Progress | None,
) -> int:
    """Documents written, the held-out ones to `valid`."""
    held: set[bytes] = set()  # texts in valid
    last: list[int] = []  # the last training document, in case nothing is held out
    documents = 0
    for text, ids in encoded:
        if hold_out:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            chosen = int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64
            if chosen and valid.tokens + len(ids) <= HELD_OUT_TOKENS:
                held.add(digest)
                valid.write(ids)
                documents += 1
                continue
            if digest in held:
                continue
        train.write(last)
        last = ids
        documents += 1
        if progress is not None and documents % BATCH_DOCUMENTS == 0:
            progress(documents, train.tokens + valid.tokens)
    if hold_out and not held and documents > 1:
        valid.write(last[:HELD_OUT_TOKENS])
        last = last[HELD_OUT_TOKENS:]
    train.write(last)
    if progress is not None:
        progress(documents, train.tokens + valid.tokens)
    return documents
