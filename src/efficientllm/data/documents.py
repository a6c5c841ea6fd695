"""Documents out of text: local files, folders of them, and data sets of the Hugging Face hub.

Everything here streams: no file is held in memory, except a .txt file that is one document.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientllm.data.compressed import lines, reading
from efficientllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPRESSIONS = (".gz", ".xz", ".zst")
KINDS = (".jsonl", ".parquet", ".txt")
TXT_SPLITS = ("line", "blank", "file")
READABLE = "a .jsonl (.gz, .xz, .zst), .parquet or .txt file, a folder of them, or a hub data set"

Render = Callable[[Mapping[str, Any], str], str | None]


@dataclass(frozen=True)
class DataSource:
    """One `--data`: what was asked (`spec`), a path or hub data set (`location`), and its weight in the mixture."""

    spec: str
    location: str
    weight: float = 1.0

    @property
    def path(self) -> Path | None:
        """The file or folder, or None for a hub data set; an existing path wins over a hub id."""
        path = Path(self.location).expanduser()
        return path if path.exists() else None


def parse_source(spec: str, is_read: bool = True) -> DataSource:
    """The source that `DATA` or `DATA=WEIGHT` names.

    A spec that exists as a path is that path, whatever characters it has.

    Args:
        is_read: whether it must be there, to be read; not where a run has its tokens already.

    Raises:
        ConfigError: the weight is not a finite number above 0.
        DataError: the spec is empty, or is a path where nothing exists.
    """
    if not spec.strip():
        raise DataError(f"data {spec!r}: no path or name; give {READABLE}")
    location, weight = spec, 1.0
    if "=" in spec and not Path(spec).expanduser().exists():
        location, _, number = spec.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"data {spec}: the weight {number!r} is not a finite number above 0; write DATA=0.3")
    source = DataSource(spec, location, weight)
    if is_read and source.path is None and _looks_like_path(location):
        raise DataError(f"data {spec}: {location!r} does not exist; give {READABLE}")
    return source


def read_documents(
    source: DataSource,
    *,
    text_field: str = "text",
    txt_split: str = "file",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Iterator[str]:
    """The source's documents in a fixed order (a folder's files sorted by path), those without any text left out.

    A row gives its `text_field`; a row without it but with `messages` is rendered by the tokenizer's chat template.

    Raises:
        ConfigError: `txt_split` is not line, blank or file.
        DataError: nothing there, no document in it, no text field, broken JSON, compression or parquet, not UTF-8.
    """
    if txt_split not in TXT_SPLITS:
        raise ConfigError(f"txt split {txt_split!r} is unknown; use one of {', '.join(TXT_SPLITS)}")

    def render(row: Mapping[str, Any], where: str) -> str | None:
        return _row_text(row, where, text_field, tokenizer)

    found = False
    path = source.path
    documents = _hub_documents(source, render) if path is None else _local_documents(path, render, txt_split)
    for text in documents:
        if text and not text.isspace():
            found = True
            yield text
    if not found:
        raise DataError(f"data {source.spec}: empty, no document has text; give data with text")


def _looks_like_path(location: str) -> bool:
    name = location.lower()
    return location.startswith(("/", ".", "~")) or location.count("/") > 1 or _kind(Path(name)) is not None


def _kind(path: Path) -> str | None:
    """`.jsonl`, `.parquet` or `.txt`, or None for a file that cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        return ".jsonl" if suffixes[-1:] == [".jsonl"] else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def _local_documents(path: Path, render: Render, txt_split: str) -> Iterator[str | None]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _kind(file) is not None and file.is_file())
        if not files:
            raise DataError(f"data {path}: the folder holds no .jsonl, .parquet or .txt file; give {READABLE}")
    for file in files:
        kind = _kind(file)
        if kind is None:
            raise DataError(f"data {file}: the extension {file.suffix or '(none)'!r} is unknown; give {READABLE}")
        with reading(file):
            if kind == ".jsonl":
                yield from _jsonl_documents(file, render)
            elif kind == ".parquet":
                yield from _parquet_documents(file, render)
            else:
                yield from _txt_documents(file, txt_split)


def _jsonl_documents(file: Path, render: Render) -> Iterator[str | None]:
    for number, line in lines(file):
        if line.isspace():
            continue
        where = f"data {file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: invalid JSON ({error}); fix or remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}, not a JSON object; write one object per line")
        yield render(row, where)


def _parquet_documents(file: Path, render: Render) -> Iterator[str | None]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield render(row, f"data {file}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"data {file}: corrupt parquet file ({_first_line(error)}); download it again") from None


def _txt_documents(file: Path, txt_split: str) -> Iterator[str]:
    if txt_split == "file":
        yield "".join(line for _, line in lines(file))
        return
    block: list[str] = []
    for _, line in lines(file):
        if txt_split == "line":
            yield line.rstrip("\r\n")
        elif line.isspace():
            yield "".join(block).rstrip("\r\n")
            block = []
        else:
            block.append(line)
    yield "".join(block).rstrip("\r\n")


def _hub_documents(source: DataSource, render: Render) -> Iterator[str | None]:
    import datasets

    name, config, split = ([*source.location.split(":"), "", ""])[:3]
    where = f"data {source.spec}"
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield render(row, f"{where}, row {number}")
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # the hub's errors share no type
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise DataError(
            f"{where}: no such path, and the hub returned no data set ({reason}); check name:config:split"
        ) from None


def _row_text(
    row: Mapping[str, Any], where: str, text_field: str, tokenizer: "PreTrainedTokenizerBase | None"
) -> str | None:
    if text_field in row:
        text = row[text_field]
    elif "messages" in row:
        if tokenizer is None or not tokenizer.chat_template:
            raise DataError(
                f"{where}: has messages, but the tokenizer has no chat template; use data with {text_field!r}"
            )
        try:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        except Exception as error:  # a template is a program: it may raise anything
            raise DataError(
                f"{where}: the chat template rejects its messages ({_first_line(error)}); fix or remove the row"
            ) from None
    else:
        fields = ", ".join(row) or "none"
        raise DataError(f"{where}: no field {text_field!r}, found {fields}; name the text with --text-field")
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: {text_field!r} holds {type(text).__name__}, not text; choose another --text-field")
    if text is not None and not text.isascii():
        # JSON may escape half a surrogate pair, which no tokenizer takes
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
