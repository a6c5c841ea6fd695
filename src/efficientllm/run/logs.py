"""The logs of a run: metrics.jsonl and removals.jsonl, a row a line, and what `--log-to` names beside them."""

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from efficientllm.errors import ConfigError
from efficientllm.files import write_whole


class JsonLines:
    """A file of JSON rows, appended to; rows past a step can be cut off again. Without a path it swallows them."""

    def __init__(self, path: Path | None) -> None:
        self.path = path or Path(os.devnull)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        if self.path != Path(os.devnull):
            os.fsync(self._file.fileno())

    def cut_back(self, step: int) -> None:
        """Drops the rows after `step`, and a last line that was never finished."""
        if self.path == Path(os.devnull):
            return
        self._file.close()
        rows = [row for row in read_rows(self.path) if row["step"] <= step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the complete rows of a log; a line cut off by a kill ends them."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def check_installed(kind: str | None) -> None:
    """Raises ConfigError if what `--log-to` names is not installed."""
    if kind is not None and find_spec(kind) is None:
        raise ConfigError(f"--log-to {kind}: not installed; run pip install 'efficientllm[{kind}]'")


class ExternalLog:
    """TensorBoard or wandb, whichever `--log-to` names; None logs nowhere."""

    def __init__(self, kind: str | None, out: Path, config: Mapping[str, Any]) -> None:
        self._board: Any = None
        self._wandb: Any = None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"))
        elif kind == "wandb":
            import wandb

            self._wandb = wandb.init(project="efficientllm", name=out.name, dir=str(out), config=dict(config))

    def append(self, row: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
