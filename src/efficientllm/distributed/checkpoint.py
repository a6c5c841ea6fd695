"""Checkpoints: written during training, whole or not at all, for any number of ranks; safetensors and JSON only.

checkpoints/step-00000300/
  shards/            weights and moments ("exp_avg:model.norm.weight"), every rank's part in a file of its own; units
                     that wait for compaction are zero. torch.distributed.checkpoint's Hugging Face format
  config.json        the model at its present shape
  extra.safetensors  buffers, random state, the moving average of the saliency
  state.json         everything else
  manifest.json      sha256 of every file above, written last
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from efficientllm.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# one process needs no process group; these are notes of that, made in threads where no context can silence them
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

MANIFEST, SHARDS = "manifest.json", "shards"
PATIENCE = timedelta(hours=12)  # for the slowest rank's part
KEPT = 2  # the last good one, and one to fall back on


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose checksums have been verified."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def config(self) -> "PretrainedConfig":
        """Returns the config of the model at the shape it had."""
        from transformers import AutoConfig

        config: PretrainedConfig = AutoConfig.from_pretrained(self.path)
        return config

    def load_(self, tensors: dict[str, Tensor]) -> None:
        """Fills weights and moments in place, by name: tensors or parts of them, on whatever ranks they are."""
        # the default reader would unpickle; every rank reads its own part, without asking the others
        load(tensors, storage_reader=HuggingFaceStorageReader(str(self.path / SHARDS)), no_dist=True)

    def extra(self) -> dict[str, Tensor]:
        """Returns the tensors that were saved beside weights and moments."""
        return {name: tensor.clone() for name, tensor in load_file(self.path / "extra.safetensors").items()}


class Checkpoints:
    """The checkpoints that a run writes, one at a time, while it trains on; every rank holds one of these.

    Kept are the last two, and the last at or before step `keep_before`, from which a longer run can continue.
    """

    def __init__(self, folder: Path, keep_before: int) -> None:
        self.folder, self.keep_before = folder, keep_before
        # a group of its own: these collectives run in a thread, beside those of the training
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None
        self._is_main = self._group is None or dist.get_rank() == 0
        self._closer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Any] | None = None

    def save(
        self,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        extra: Mapping[str, Tensor],
        config: "PretrainedConfig",
    ) -> None:
        """Copies everything and returns; threads write it. All ranks call this together.

        Args:
            tensors: weights and moments, each rank's own part. State, extra and config are the main rank's.
        """
        self.finish()
        step = state["step"]
        partial = self.folder / f".step-{step:08d}.partial"
        if self._is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            copies = {name: tensor.detach().cpu().contiguous() for name, tensor in extra.items()}
            save_file(copies, partial / "extra.safetensors")
            config.to_json_file(partial / "config.json", use_diff=False)
            (partial / "state.json").write_text(json.dumps(state))
        if self._group is not None:
            dist.barrier(self._group)
        written = async_save(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_writer=HuggingFaceStorageWriter(str(partial / SHARDS), save_distributed=True),
            process_group=self._group,
            no_dist=self._group is None,
        )
        assert isinstance(written, Future)
        self._writing = self._closer.submit(self._close, written, partial, step) if self._is_main else written

    def finish(self) -> None:
        """Waits until the last checkpoint is whole.

        Raises:
            OSError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise OSError(str(cause)) from None

    def poll(self) -> None:
        """Raises what went wrong with a checkpoint that is not being written any more; never waits."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def _close(self, written: "Future[Any]", partial: Path, step: int) -> None:
        """Gives a checkpoint its name, once every rank has written its part."""
        try:
            written.result()
            files = sorted(file for file in partial.rglob("*") if file.is_file())
            sums = {str(file.relative_to(partial)): _sha256(file) for file in files}
            (partial / MANIFEST).write_text(json.dumps(sums, indent=2))
            for file in (*partial.iterdir(), partial):
                _fsync(file)
            final = self.folder / f"step-{step:08d}"
            if final.exists():  # of a run that was cut back to an earlier step
                shutil.rmtree(final)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _fsync(self.folder)
        _drop_old(self.folder, step, self.keep_before)


def last_checkpoint(
    folder: Path, at_most: int | None = None, report: Callable[[str], None] | None = None
) -> Checkpoint | None:
    """Returns the latest checkpoint that is whole, at step `at_most` or before; None if there is none.

    Damaged ones are passed over, and said to `report`.

    Raises:
        CheckpointError: if there are some, and all are damaged.
    """
    paths = [path for path in _steps(folder) if at_most is None or _step_of(path) <= at_most]
    for path in reversed(paths):
        damage = _damage(path)
        if damage is None:
            return Checkpoint(path, json.loads((path / "state.json").read_text()))
        if report:
            report(f"checkpoint {path.name} is damaged ({damage}); using the one before it")
    if paths:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged ({len(paths)} in all); remove them to start from step 0"
        )
    return None


def open_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Returns the checkpoint of a step that another rank has found to be whole."""
    path = folder / f"step-{step:08d}"
    return Checkpoint(path, json.loads((path / "state.json").read_text()))


def _damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint: a file that is missing or whose checksum differs."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} has a wrong checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError):
        return f"{MANIFEST} is invalid"
    return None


def _drop_old(folder: Path, step: int, keep_before: int) -> None:
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    paths = [path for path in _steps(folder) if _step_of(path) <= step]
    kept = set(paths[-KEPT:])
    kept.update([path for path in paths if _step_of(path) <= keep_before][-1:])
    for path in _steps(folder):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
