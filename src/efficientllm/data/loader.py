"""Batches for training: rows of several token folders, shuffled and mixed by grain, without end.

The mixture is a function from a row number to a row, so a position in the data is one integer.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efficientllm.data.token_folder import TokenFolder
from efficientllm.errors import ConfigError, DataError
from efficientllm.numbers import counted

if TYPE_CHECKING:
    import grain
    import torch


READ_THREADS = 2  # rows come out of mapped memory: more threads gain nothing


def mixture(
    parts: Sequence[tuple[TokenFolder, float]], *, seq_len: int, seed: int, include_valid: bool
) -> "grain.MapDataset[NDArray[np.int64]]":
    """An endless data set of rows, int64 (seq_len,), random access and the same for the same seed.

    Every folder is reshuffled each time it is used up. All rows are equally long, so `weights` are shares of tokens.
    `include_valid` adds the held-out rows, for a run that validates on other data.

    Raises:
        DataError: a folder holds less than one row.
        ConfigError: no folder, or a weight that is not above 0.
    """
    if not parts or any(not weight > 0 for _, weight in parts):
        raise ConfigError(
            "a mixture needs at least one source, each with a weight above 0; found weights "
            f"{[weight for _, weight in parts]}"
        )
    grain = _grain()
    sources = []
    for number, (folder, _) in enumerate(parts):
        rows = folder.rows(seq_len, "all" if include_valid else "train")
        if not len(rows):
            tokens = folder.tokens + (folder.valid_tokens if include_valid else 0)
            raise DataError(
                f"data {folder.spec}: {counted(tokens, 'training token')}, less than one row of {seq_len}; "
                "lower --seq-len or give more text"
            )
        sources.append(grain.MapDataset.source(rows).seed((seed + number) % 2**32).shuffle().repeat(None))
    total = sum(weight for _, weight in parts)
    return grain.MapDataset.mix(sources, weights=[weight / total for _, weight in parts])


def batches(
    dataset: "grain.MapDataset[NDArray[np.int64]]", start_row: int, batch_rows: int, rank: int = 0, num_ranks: int = 1
) -> Iterator[NDArray[np.int64]]:
    """A rank's parts of the batches, int64 (batch_rows / num_ranks, seq_len), from row `start_row` on.

    The global batches are the same for every number of ranks. Threads read ahead and do not touch the order.
    """
    options = _grain().ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=2 * batch_rows)
    rows = dataset.slice(slice(start_row + rank, None, num_ranks)).to_iter_dataset(options)
    return iter(rows.batch(batch_rows // num_ranks, batch_fn=np.stack))


def on_device(parts: Iterator[NDArray[np.int64]], device: "torch.device") -> "Iterator[torch.Tensor]":
    """The batches as tensors on a device; to a GPU from pinned memory, one ahead of the step under way."""
    import torch

    if device.type == "cpu":
        yield from map(torch.from_numpy, parts)
        return
    moving = (torch.from_numpy(part).pin_memory().to(device, non_blocking=True) for part in parts)
    upcoming = next(moving, None)
    while upcoming is not None:
        batch, upcoming = upcoming, next(moving, None)
        yield batch


def epochs(
    folders: Sequence[TokenFolder],
    weights: Sequence[float],
    seq_len: int,
    rows_total: int,
    *,
    include_valid: bool = False,
) -> dict[str, float]:
    """How often each folder (by its spec) has been gone through after `rows_total` rows of the mixture.

    Above 1 its rows are repeated. Of two folders with the same spec the more repeated one counts.
    """
    result: dict[str, float] = {}
    for folder, weight in zip(folders, weights, strict=True):
        rows = len(folder.rows(seq_len, "all" if include_valid else "train"))
        times = rows_total * weight / sum(weights) / max(rows, 1)
        result[folder.spec] = max(times, result.get(folder.spec, 0.0))
    return result


class Loader:
    """The training data of a run: its batches from any step on, and how often each source has been seen.

    Args:
        parts: token folders with their weights in the mixture.
        batch_rows: rows of an optimizer step.
        include_valid: whether held-out rows are trained on, for a run that validates on other data.
    """

    def __init__(
        self,
        parts: Sequence[tuple[TokenFolder, float]],
        *,
        seq_len: int,
        batch_rows: int,
        seed: int,
        include_valid: bool,
    ) -> None:
        self.batch_rows = batch_rows
        self.rows = mixture(parts, seq_len=seq_len, seed=seed, include_valid=include_valid)
        folders, weights = zip(*parts, strict=True)
        self.epochs_per_row = epochs(folders, weights, seq_len, 1, include_valid=include_valid)

    def after(self, step: int, device: "torch.device", rank: int = 0, num_ranks: int = 1) -> "Iterator[torch.Tensor]":
        """Returns a rank's parts of the batches after a step, on its device."""
        return on_device(batches(self.rows, step * self.batch_rows, self.batch_rows, rank, num_ranks), device)

    def epochs(self, steps: int) -> dict[str, float]:
        """Returns how often each source has been gone through after that many steps, by its spec."""
        return {spec: per_row * steps * self.batch_rows for spec, per_row in self.epochs_per_row.items()}


def require_batch(folders: Sequence[TokenFolder], batch_tokens: int, *, include_valid: bool = False) -> None:
    """Raises DataError if all folders together hold fewer tokens than one batch."""
    tokens = sum(folder.tokens + (folder.valid_tokens if include_valid else 0) for folder in folders)
    if tokens < batch_tokens:
        names = ", ".join(folder.spec for folder in folders)
        raise DataError(
            f"data {names}: {counted(tokens, 'training token')}, less than one batch of {batch_tokens}; "
            "lower --batch-tokens or give more text"
        )


def _grain() -> Any:
    """grain, whose import warns on every machine without jax."""
    # absl must come first: it gives its logger a class of its own
    import absl.logging  # noqa: F401

    logging.getLogger("absl").addFilter(_not_about_jax)
    import grain

    return grain


def _not_about_jax(record: logging.LogRecord) -> bool:
    return "jax profiler" not in record.getMessage()
