"""Token shards: one-dimensional `.npy` files, written piece by piece and read at random without loading them."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SHARD_TOKENS = 64 << 20


class Rows(Sequence[NDArray[np.int64]]):
    """Rows of `seq_len` token ids, cut within each shard; a shard's tail shorter than a row is dropped."""

    def __init__(self, shards: Sequence[NDArray[Any]], seq_len: int) -> None:
        self.shards, self.seq_len = shards, seq_len
        self.ends = list(accumulate(len(shard) // seq_len for shard in shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        """Row `index`, int64 (seq_len,)."""
        row = range(len(self))[index]  # takes negative numbers, raises IndexError
        shard = bisect_right(self.ends, row)
        start = (row - (self.ends[shard - 1] if shard else 0)) * self.seq_len
        return self.shards[shard][start : start + self.seq_len].astype(np.int64)


def open_shard(path: Path, split: str, number: int) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path / f"{split}-{number:05d}.npy", mmap_mode="r", allow_pickle=False)
    return array


class ShardWriter:
    """Appends tokens to `.npy` files of at most SHARD_TOKENS, a Mi tokens in memory at a time."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.folder, self.split, self.dtype = folder, split, np.dtype(dtype).newbyteorder("<")
        self.shards: list[int] = []
        self.tokens = 0
        self.digest = hashlib.sha256()
        self._pending: list[int] = []
        self._file: BinaryIO | None = None

    def write(self, ids: list[int]) -> None:
        self._pending += ids
        self.tokens += len(ids)
        if len(self._pending) >= 1 << 20:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._end_shard()

    def _flush(self) -> None:
        tokens = np.array(self._pending, dtype=self.dtype)
        self._pending = []
        self.digest.update(tokens.tobytes())
        while len(tokens):
            if self._file is None or self.shards[-1] == SHARD_TOKENS:
                self._end_shard()
                self._file = (self.folder / f"{self.split}-{len(self.shards):05d}.npy").open("wb")
                self._header(SHARD_TOKENS)
                self.shards.append(0)
            part = tokens[: SHARD_TOKENS - self.shards[-1]]
            self._file.write(part.tobytes())
            self.shards[-1] += len(part)
            tokens = tokens[len(part) :]

    def _header(self, size: int) -> None:
        """numpy pads its header so that a longer first axis fits: the size can be written when it is known."""
        assert self._file is not None
        self._file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def _end_shard(self) -> None:
        if self._file is not None:
            self._header(self.shards[-1])
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
