"""Checkpoints: atomic, checksummed, safetensors and JSON only.

checkpoints/step-00000300/
  config.json  model.safetensors     weights at their present shapes; units that wait for compaction are zero
  optimizer.safetensors              the optimizer's tensors as "exp_avg:model.norm.weight"
  extra.safetensors                  random state, the moving average of the saliency
  state.json                         everything else
  manifest.json                      sha256 of every file above, written last
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from efficientllm.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST = "manifest.json"
KEPT = 2  # the last good one, and one to fall back on


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose checksums have been verified."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def load_model(self) -> "PreTrainedModel":
        """Returns the model in float32 on the CPU, at the shapes it had."""
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        return model

    def moments(self) -> dict[str, Tensor]:
        """Returns the optimizer's tensors, by "field:parameter"."""
        return load_file(self.path / "optimizer.safetensors")

    def extra(self) -> dict[str, Tensor]:
        """Returns the tensors that were saved beside model and optimizer."""
        return {name: tensor.clone() for name, tensor in load_file(self.path / "extra.safetensors").items()}


def save_checkpoint(
    folder: Path,
    model: "PreTrainedModel",
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
    extra: Mapping[str, Tensor],
    keep_before: int,
) -> Path:
    """Writes one checkpoint, whole or not at all, and drops older ones.

    Kept are the last two, and the last at or before step `keep_before`, from which a longer run can go on.
    """
    step = state["step"]
    final = folder / f"step-{step:08d}"
    partial = folder / f".step-{step:08d}.partial"
    try:
        _write(partial, model, moments, state, extra)
        if final.exists():  # of a run that was cut back to an earlier step
            shutil.rmtree(final)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _fsync(folder)
    _drop_old(folder, step, keep_before)
    return final


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
            report(f"checkpoint {path.name} is damaged ({damage}); the one before it is used")
    if paths:
        raise CheckpointError(f"{folder}: all {len(paths)} checkpoints are damaged; remove them to start from step 0")
    return None


def _write(
    partial: Path,
    model: "PreTrainedModel",
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
    extra: Mapping[str, Tensor],
) -> None:
    """Writes every file of a checkpoint into a new folder, the checksums last."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: param.detach().contiguous() for name, param in model.named_parameters()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    save_file({key: tensor.contiguous() for key, tensor in moments.items()}, partial / "optimizer.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in extra.items()}, partial / "extra.safetensors")
    model.config.to_json_file(partial / "config.json", use_diff=False)
    (partial / "state.json").write_text(json.dumps(state))
    sums = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(sums, indent=2))
    for file in partial.iterdir():
        _fsync(file)


def _damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint: a file that is missing or whose checksum differs."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} has another checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError):
        return f"{MANIFEST} is broken"
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
