"""The data of a run: every `--data` as token shards, and the rows held out for validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from efficientllm.config.run_config import RunConfig
from efficientllm.data.documents import DataSource, parse_source
from efficientllm.data.shards import Rows
from efficientllm.data.token_folder import TokenFolder, is_prepared, open_tokens, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Corpus:
    """Token folders with their weights; without folders of its own, validation takes what those hold out."""

    parts: tuple[tuple[TokenFolder, float], ...]
    valid: TokenFolder | None

    @property
    def fingerprint(self) -> list[str]:
        """Hashes of all tokens that the run sees."""
        return [folder.sha256 for folder, _ in self.parts] + ([self.valid.sha256] if self.valid else [])

    def valid_rows(self, seq_len: int, most_tokens: int) -> Sequence[NDArray[Any]]:
        """Returns rows to validate on, `most_tokens` at most; shorter ones where less than a row is held out."""
        if self.valid is not None:
            shards = [self.valid.rows(1, "all").shards]
        else:
            shards = [folder.rows(1, "valid").shards for folder, _ in self.parts]
        arrays = [array for each in shards for array in each]
        longest = max((len(array) for array in arrays), default=0)
        length = min(seq_len, longest)
        if length < 2:
            return ()
        rows = Rows(arrays, length)
        return [rows[row] for row in range(min(len(rows), max(1, most_tokens // length)))]


def open_corpus(
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> Corpus:
    """Returns a run's data; text becomes token shards under `folder`, unless they are there already.

    `progress` is called with the source's name, its documents and tokens so far.

    Raises:
        ConfigError, DataError: as `parse_source`, `prepare` and `open_tokens`.
    """

    def tokens(source: DataSource, name: str, hold_out: bool) -> TokenFolder:
        path = source.path
        if path is not None and path.is_dir() and is_prepared(path):
            return open_tokens(path, tokenizer, source.spec)
        if (folder / name).exists():
            return open_tokens(folder / name, tokenizer, source.spec)
        return prepare(
            [source],
            tokenizer,
            folder / name,
            text_field=config.text_field,
            txt_split=config.txt_split,
            document_separator=config.document_separator,
            hold_out=hold_out,
            progress=None if progress is None else lambda documents, count: progress(source.spec, documents, count),
        )

    def find(spec: str, name: str) -> DataSource:
        return parse_source(spec, is_read=not (folder / name).exists())

    sources = {f"train-{number:02d}": find(spec, f"train-{number:02d}") for number, spec in enumerate(config.data)}
    valid_source = None if config.valid is None else find(config.valid, "valid")
    parts = tuple((tokens(source, name, valid_source is None), source.weight) for name, source in sources.items())
    return Corpus(parts, None if valid_source is None else tokens(valid_source, "valid", False))
