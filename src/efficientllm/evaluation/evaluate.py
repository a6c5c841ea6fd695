"""One model's scores: in the harness's tasks and on text."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from efficientllm.data.documents import DataSource, read_documents
from efficientllm.distributed.device import find_device, is_out_of_memory
from efficientllm.errors import ConfigError
from efficientllm.evaluation.perplexity import TextScore, score_text
from efficientllm.evaluation.tasks import SEVEN, TASKS
from efficientllm.models.load import load_model, load_tokenizer

if TYPE_CHECKING:
    from efficientllm.evaluation.harness import Loaded, Score


@dataclass(frozen=True)
class Evaluation:
    """What one model has scored.

    Attributes:
        model, path: as asked, and the folder or hub id that was loaded.
        num_params: tied ones counted once.
        dtype: of the weights and products.
        tasks, texts: by the name of the task, and of the text as asked.
    """

    model: str
    path: str
    num_params: int
    dtype: str
    seconds: float
    tasks: Mapping[str, "Score"]
    texts: Mapping[str, TextScore]

    @property
    def average(self) -> tuple[float, float] | None:
        """Mean of the seven tasks that the paper averages, each by its own metric, and its error; None if one lacks."""
        if not set(SEVEN) <= set(self.tasks):
            return None
        found = [self.tasks[name].metrics[TASKS[name].metric] for name in SEVEN]
        squares = sum((error or 0.0) ** 2 for _, error in found)
        return sum(value for value, _ in found) / len(SEVEN), math.sqrt(squares) / len(SEVEN)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "model": self.model,
            "path": self.path,
            "params": self.num_params,
            "dtype": self.dtype,
            "seconds": round(self.seconds, 1),
            "tasks": {
                name: {
                    "n": score.num_items,
                    "of": score.num_all,
                    "truncated": score.truncated,
                    "source": score.source,
                    "version": score.version,
                    **_with_errors(score.metrics),
                    **(
                        {"parts": {part: _with_errors(each) for part, each in score.parts.items()}}
                        if score.parts
                        else {}
                    ),
                }
                for name, score in self.tasks.items()
            },
            **({"average_of_seven": _with_errors({"mean": self.average})} if self.average else {}),
            "texts": {
                name: {
                    "documents": len(text.nats),
                    "tokens": sum(text.num_tokens),
                    "bytes": sum(text.num_bytes),
                    "window": text.window,
                    **_with_errors(
                        {"loss": text.loss, "perplexity": text.perplexity, "bits_per_byte": text.bits_per_byte}
                    ),
                }
                for name, text in self.texts.items()
            },
        }


def evaluate_model(
    model: str,
    path: str,
    tasks: Sequence["Loaded"],
    texts: Sequence[DataSource],
    *,
    limit: int | None,
    batch_size: int,
    reading: Mapping[str, str],
    trust_remote_code: bool,
) -> Evaluation:
    """Returns the scores of one model.

    Args:
        limit: most items of a task and documents of a text.
        reading: `text_field` and `txt_split` of the texts.

    Raises:
        EfficientLLMError: the model or a text cannot be read, or memory runs out.
    """
    start = time.monotonic()
    tokenizer = load_tokenizer(path, trust_remote_code)
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer.backend_tokenizer.no_truncation()  # a tokenizer.json may carry one that cuts long contexts unseen
    loaded: Any = load_model(path, trust_remote_code=trust_remote_code).to(find_device())
    scores, found = {}, {}
    for source in texts:
        documents = islice(read_documents(source, **reading), limit)
        with _shown(f"{model}: {source.spec}") as advance:
            try:
                found[source.spec] = score_text(loaded, tokenizer, documents, batch_size=batch_size, advance=advance)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise ConfigError(f"eval: out of memory with --batch-size {batch_size}; give a smaller one") from None
    for task in tasks:
        from efficientllm.evaluation.harness import score

        with _shown(f"{model}: {task.task.name}") as advance:
            scores[task.task.name] = score(loaded, tokenizer, task, limit=limit, batch_size=batch_size, advance=advance)
    return Evaluation(
        model=model,
        path=path,
        num_params=sum(param.numel() for param in loaded.parameters()),
        dtype=str(loaded.dtype).removeprefix("torch."),
        seconds=time.monotonic() - start,
        tasks=scores,
        texts=found,
    )


@contextmanager
def _shown(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yields what takes (done, in all) for a bar on a terminal; then prints a line with the time it took."""
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)  # kept if stderr is redirected meanwhile
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    start = time.monotonic()
    with bar:
        row = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)
    console.print(f"{what}: {time.monotonic() - start:.1f} s", markup=False)


def _with_errors(metrics: Mapping[str, tuple[float, float | None]]) -> dict[str, float | None]:
    """Returns metrics with their standard errors beside them, as JSON has them: a figure that is not finite is null."""
    found: dict[str, float | None] = {}
    for name, (value, error) in metrics.items():
        found[name] = value if math.isfinite(value) else None
        found[f"{name}_stderr"] = error if error is not None and math.isfinite(error) else None
    return found
