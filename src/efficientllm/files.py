"""What commands write: whole or not at all, and never over what was not meant."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from efficientllm.errors import ConfigError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all: what was there stays until all of the new one is on the disk.

    Raises:
        OSError: if it cannot be written; nothing is left beside it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def check_out(out: Path, overwrite: bool, folder: bool) -> None:
    """Raises ConfigError if the output is there and may not be replaced."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ConfigError(f"--out {out} exists; add --overwrite to replace it, or choose another name")
    if out.is_dir() != folder:
        found, wanted = ("a folder", "a file") if out.is_dir() else ("a file", "a folder")
        raise ConfigError(f"--out {out} is {found}, but {wanted} would be written; choose another name")


def check_space(out: Path, num_bytes: int) -> None:
    """Raises ConfigError if the disk that `out` is to lie on has too little room."""
    anchor = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(anchor).free
    if free < num_bytes:
        raise ConfigError(
            f"--out {out}: {num_bytes:,} bytes are needed, but only {free:,} are free; free up space or choose another "
            "disk"
        )


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yields an empty folder near `out`, on the same disk, that is removed in any case.

    Raises:
        ConfigError: if it cannot be written.
    """
    anchor = next(parent for parent in out.absolute().parents if parent.exists())
    folder = anchor / f".{out.name}.partial-{os.getpid()}"
    try:
        try:
            folder.mkdir()
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put(partial: Path, out: Path) -> None:
    """Moves what is whole and proven from its staging folder to its place; what was there goes with that folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rename(partial.with_name("replaced"))
    partial.rename(out)
