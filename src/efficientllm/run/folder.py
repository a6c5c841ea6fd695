"""The run folder: made whole or not at all, and what a resumed run may change in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from efficientllm.config.run_config import FIELDS, RunConfig, dump_yaml, flag_name, load_yaml
from efficientllm.errors import CheckpointError, ConfigError
from efficientllm.files import staging, write_whole

# All else decides what comes out, or was used up already.
CHANGEABLE = {
    "tokens",
    "lr",
    "eval_every",
    "checkpoint_every",
    "log_to",
    "dtype",
    "activation_checkpointing",
    "engine",
    "shards",
    "compile",
    "micro_batch_size",
    "precision",
    "threads",
    "out",
}


def check_new(out: Path) -> None:
    """Raises ConfigError if the folder of a new run is there already."""
    if os.path.lexists(out):
        raise ConfigError(f"--out {out} exists; add --resume to continue it, or choose another folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` if all goes well, and is removed if not.

    Raises:
        ConfigError: if it cannot be written.
    """
    with staging(out) as folder:
        yield folder
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(out)


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes config.yaml, whole or not at all."""
    write_whole(folder / "config.yaml", dump_yaml(config))


def stored_config(out: Path) -> RunConfig:
    """Returns the config of a run folder.

    Raises:
        CheckpointError: no such folder, or not a run's.
    """
    if not out.is_dir():
        raise CheckpointError(f"--resume: no run folder {out}; remove --resume to start a new run, or check --out")
    if not (out / "config.yaml").is_file():
        raise CheckpointError(f"--resume: {out} has no config.yaml, so it is not a run folder; check --out")
    return load_yaml(out / "config.yaml")


def continued(config: RunConfig, stored: RunConfig) -> RunConfig:
    """Returns the config with which a stored run continues.

    Raises:
        ConfigError: if it asks for another run: another model, target or data, or for fewer tokens.
    """
    changed = {}
    for name, each in FIELDS.items():
        asked, had = getattr(config, name), getattr(stored, name)
        if asked == had or (asked is None and each.default is None):  # None: the run's own value
            continue
        if name not in CHANGEABLE:
            raise ConfigError(
                f"--resume with {flag_name(name)} {_text(asked)}: the run in {config.out} has {_text(had)}; "
                f"keep that value, or start another run with another --out"
            )
        changed[name] = asked
    if changed.get("engine") == "ddp" and "shards" not in changed:
        changed["shards"] = None  # they were fsdp's
    if config.tokens < stored.tokens:
        raise ConfigError(
            f"--resume with --tokens {config.tokens}: the run has {stored.tokens}, which sets its learning rate; "
            "give at least as many"
        )
    return replace(stored, **changed)


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
