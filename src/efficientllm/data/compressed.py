"""Lines of text files, plain or compressed, with errors that name the file and the line."""

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from efficientllm.errors import DataError

CHUNK = 1 << 20  # bytes per read of a .zst file


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns what a broken file raises into a DataError that names it."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(
            f"data {file}: corrupt or truncated {file.suffix} file ({error}); download or compress it again"
        ) from None
    except OSError as error:
        raise DataError(f"data {file}: cannot be read ({error.strerror or error}); check the file") from None


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a UTF-8 file; a byte order mark is dropped."""
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"data {file}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}); convert the file to UTF-8"
                ) from None


def _open(file: Path) -> io.BufferedIOBase:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file, "rb")
    if suffix == ".xz":
        return lzma.open(file, "rb")
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(file), CHUNK)
    return file.open("rb")


class _ZstdFile(io.RawIOBase):
    """A .zst file, frame after frame. zstandard's own reader takes a file that is cut off for one that ends."""

    def __init__(self, file: Path) -> None:
        import zstandard

        self._file = file.open("rb")
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # also takes `zstd --long=31`
        self._frame = self._decompressor.decompressobj()
        self._started = False  # inside a frame
        self._pending = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._started = self._decompressor.decompressobj(), False
            data = data or self._file.read(CHUNK // 8)
            if not data:
                if self._started:
                    raise EOFError("it ends inside a frame")
                return 0
            self._started = True
            try:
                self._pending = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from None
        size = min(len(buffer), len(self._pending))
        buffer[:size], self._pending = self._pending[:size], self._pending[size:]
        return size
