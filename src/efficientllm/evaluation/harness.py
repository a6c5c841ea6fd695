"""lm-evaluation-harness: its definitions of the tasks on the hub's data or on local files, and a model's scores."""

import io
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import lm_eval
from lm_eval.api.group import AggMetricConfig, Group
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from efficientllm.distributed.device import is_out_of_memory
from efficientllm.errors import ConfigError, DataError
from efficientllm.evaluation.tasks import Task, local_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFINITIONS = Path(lm_eval.__file__).parent / "tasks"
# The zero-shot prompts need no other split; fewshot_split is MMLU's.
ONE_SPLIT = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
Advance = Callable[[int, int | None], None]  # (requests done, requests in all)


@dataclass(frozen=True)
class Loaded:
    """A task with its data, ready for any model.

    Attributes:
        parts: the harness's task, or the tasks of the group (MMLU's subjects), as its `evaluate` takes them.
        source: the local file, or the hub's data set.
    """

    task: Task
    parts: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Score:
    """What a model scores in one task.

    Attributes:
        metrics: (value, standard error) by the harness's name: acc, acc_norm. No error from one item alone.
        num_items: items scored; `num_all` are those there are.
        truncated: requests whose context was cut on the left because the model's is shorter.
        parts: of a group, the metrics of its tasks.
        version: of the harness's definition.
    """

    task: str
    metrics: dict[str, tuple[float, float | None]]
    num_items: int
    num_all: int
    truncated: int
    source: str
    version: str
    parts: dict[str, dict[str, tuple[float, float | None]]]


def load_tasks(tasks: Sequence[Task], folder: Path | None) -> list[Loaded]:
    """Returns the tasks with the rows of local files, or without a folder with the hub's.

    Raises:
        DataError: a local file that is not there or broken, or the hub gives no data.
    """
    with _quiet():
        manager = TaskManager(
            include_path=sorted({DEFINITIONS / task.folder for task in tasks}), include_defaults=False
        )
        return [_from_hub(manager, task) if folder is None else _from_file(manager, task, folder) for task in tasks]


def score(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    loaded: Loaded,
    *,
    limit: int | None,
    batch_size: int,
    advance: Advance,
) -> Score:
    """Returns what the harness's `hf` model makes of a task, zero-shot; `limit` items of every part at most.

    Raises:
        ConfigError: memory runs out.
    """
    name = loaded.task.name
    noise = io.StringIO()  # a bar for each subject
    with _quiet() as cut, redirect_stderr(noise), redirect_stdout(noise):
        try:
            found = evaluate(
                lm=_Model(model, tokenizer, batch_size, advance), task_dict=loaded.parts, limit=limit, log_samples=False
            )
        except AssertionError:  # its own check of this
            raise ConfigError(
                f"eval: an answer choice of {name} is longer than the model's context; remove the task"
            ) from None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"eval: out of memory in {name} with --batch-size {batch_size}; give a smaller one"
            ) from None
    parts, sizes = list(found["n-samples"]), found["n-samples"].values()
    return Score(
        task=name,
        metrics=_metrics(found["results"][name]),
        num_items=sum(size["effective"] for size in sizes),
        num_all=sum(size["original"] for size in sizes),
        truncated=cut.number,
        source=loaded.source,
        version=str(found["versions"].get(parts[0], "")),
        parts={part: _metrics(found["results"][part]) for part in parts} if parts != [name] else {},
    )


def _from_file(manager: TaskManager, task: Task, folder: Path) -> Loaded:
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by the harness's name of the part
    for row in local_rows(task, folder):
        rows[f"mmlu_{row['subject']}" if task.name == "mmlu" else task.name].append(row)
    for part in rows:
        if part not in manager.all_tasks:
            raise DataError(f"data {folder / task.file}: the harness has no task {part}; fix the subject")
    specs = [
        {"task": part, **ONE_SPLIT, f"{task.split}_split": task.split, "custom_dataset": _dataset(task.split, held)}
        for part, held in rows.items()
    ]
    tasks = manager.load([{"group": "local", "task": specs}])["tasks"]
    return Loaded(task, _ready(task, tasks), str(folder / task.file))


def _from_hub(manager: TaskManager, task: Task) -> Loaded:
    try:
        tasks = manager.load([task.name])["tasks"]
    except Exception as error:  # the hub's errors share no type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"--tasks {task.name}: the hub returned no data ({reason}); check the connection, or give local files with "
            "--data-dir"
        ) from None
    first = next(iter(tasks.values()))
    return Loaded(task, _ready(task, tasks), f"hub {first.DATASET_PATH}")


def _ready(task: Task, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Returns tasks as `evaluate` takes them, zero-shot; those of MMLU as the group that the harness makes of them."""
    for each in tasks.values():
        each.set_config("num_fewshot", 0)
    if list(tasks) == [task.name]:
        return {"tasks": tasks}
    group = Group(task.name, aggregate_metric_list=[AggMetricConfig(metric=task.metric, weight_by_size=True)])
    for each in tasks.values():
        group.add(each)
    return {"tasks": tasks, "groups": {task.name: group}, "group_map": {task.name: group.child_names}}


def _dataset(split: str, rows: Sequence[dict[str, Any]]) -> Callable[..., datasets.DatasetDict]:
    return lambda **_: datasets.DatasetDict({split: datasets.Dataset.from_list(list(rows))})


def _metrics(result: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    found = {}
    for key, value in result.items():
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = result.get(key.replace(",", "_stderr,"))
            found[metric] = (float(value), float(error) if isinstance(error, float) else None)
    return found


class _Model(HFLM):  # type: ignore[misc]
    """The harness's model of transformers, which says how far it is."""

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int, advance: Advance
    ) -> None:
        self._advance, self._done, self._total = advance, 0, 0
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._total = len(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        self._advance(self._total, self._total)  # choices with one context share a row
        return found

    def _model_call(self, inps: "torch.Tensor", *args: Any, **more: Any) -> "torch.Tensor":
        logits: torch.Tensor = super()._model_call(inps, *args, **more)
        self._done += len(inps)
        self._advance(self._done, self._total)
        return logits


class _Cut(logging.Handler):
    """Counts the contexts that the harness says it has cut."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.number = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.number += record.getMessage().startswith("Combined length of context")


@contextmanager
def _quiet() -> Iterator[_Cut]:
    """Keeps the harness's notes from the terminal; yields the one that counts."""
    logger, cut = logging.getLogger("lm_eval"), _Cut()
    propagates, logger.propagate = logger.propagate, False
    bars = datasets.are_progress_bars_disabled()
    logger.addHandler(cut)
    datasets.disable_progress_bars()
    try:
        yield cut
    finally:
        logger.removeHandler(cut)
        logger.propagate = propagates
        if not bars:
            datasets.enable_progress_bars()
