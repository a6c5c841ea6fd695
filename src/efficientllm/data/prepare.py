"""`efficientllm prepare`: text to token shards, with a progress bar."""

from collections.abc import Sequence
from pathlib import Path

from efficientllm.numbers import counted, format_count


def prepare_command(
    data: Sequence[str],
    *,
    tokenizer: str,
    out: str,
    text_field: str,
    txt_split: str,
    document_separator: str | None,
    trust_remote_code: bool = False,
) -> int:
    """Tokenises every DATA into the new folder `out` and prints what it holds.

    Raises:
        ConfigError, DataError: as `tokens.prepare`.
        UnsupportedModelError: no tokenizer there.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from efficientllm.data.documents import parse_source
    from efficientllm.data.token_folder import prepare
    from efficientllm.models.load import load_tokenizer

    sources = [parse_source(spec) for spec in data]
    loaded = load_tokenizer(tokenizer, trust_remote_code)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    # off a terminal even a transient bar leaves an empty line
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading")

        def show(documents: int, tokens: int) -> None:
            bar.update(task, description=f"{counted(documents, 'document')}, {format_count(tokens)} tokens")

        folder = prepare(
            sources,
            loaded,
            Path(out).expanduser(),
            text_field=text_field,
            txt_split=txt_split,
            document_separator=document_separator,
            hold_out=True,
            progress=show,
        )
    print(f"{out}: {counted(folder.documents, 'document')}, {folder.tokens:,} tokens, {folder.valid_tokens:,} held out")
    return 0
