"""The tasks by name, and rows of local files written in the fields of the harness's own data sets.

A local file has a JSON object a line: `question`, `choices`, `gold` (the index of the right choice), and for MMLU
`subject`; WinoGrande has `choices` (both contexts), `continuation` and `gold`.
The harness's definition of a task works on the fields made of them, so prompts and metrics are its own.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from efficientllm.config.run_config import nearest
from efficientllm.data.compressed import lines, reading
from efficientllm.errors import ConfigError, DataError

Row = Mapping[str, Any]
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Task:
    """One task of the harness.

    Attributes:
        folder: where the harness defines it, below lm_eval/tasks.
        split: what it is scored on.
        file: its local file, below `--data-dir`.
        fields: a local row in the fields of the harness's data set; KeyError, TypeError, ValueError if it is not a row.
        metric: the one that tables show; results.json holds all.
    """

    name: str
    folder: str
    split: str
    file: str
    fields: Callable[[Row], dict[str, Any]]
    metric: str


def _right(row: Row, choices: list[str]) -> int:
    gold = row["gold"]
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"gold is {gold!r}, not an index of its {len(choices)} choices")
    return gold


def _choices(row: Row, size: int | None = None) -> list[str]:
    choices = row["choices"]
    if not isinstance(choices, list) or not all(isinstance(each, str) and each for each in choices):
        raise ValueError("choices is not a list of strings")
    if len(choices) < 2 or (size is not None and len(choices) != size):
        raise ValueError(f"{len(choices)} choices, not {size or 'two or more'}")
    return choices


def _text(row: Row, name: str) -> str:
    text = row[name]
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a string")
    return text


def _lettered(question: str) -> Callable[[Row], dict[str, Any]]:
    """ARC and OpenBookQA: the question under its name there, and choices with letters."""

    def fields(row: Row) -> dict[str, Any]:
        choices = _choices(row)
        labels = list(LETTERS[: len(choices)])
        return {
            question: _text(row, "question"),
            "choices": {"text": choices, "label": labels},
            "answerKey": labels[_right(row, choices)],
        }

    return fields


def _boolq(row: Row) -> dict[str, Any]:
    """The file's question is the prompt up to its answer, `Passage: …` and `Question: …?` a line each."""
    found = re.fullmatch(r"(?s)Passage: (.*)\nQuestion: (.*)\?", _text(row, "question"))
    if not found or _choices(row) != ["no", "yes"]:
        raise ValueError("it is not 'Passage: …', a line 'Question: …?' and the choices no, yes")
    return {"passage": found[1], "question": found[2], "label": _right(row, ["no", "yes"])}


def _hellaswag(row: Row) -> dict[str, Any]:
    """A context that ends open was cut inside a sentence: what follows the last whole one is `ctx_b`.

    The harness capitalises `ctx_b`; the file has it as the data set has it.
    """
    label, colon, context = _text(row, "question").partition(": ")
    if not colon:
        raise ValueError("question is not 'activity: context'")
    whole, cut = context, ""
    if context[-1:] not in (".", "?", "!"):
        *sentences, cut = re.split(r"(?<=[.?!]) ", context)
        whole = " ".join(sentences)
    endings = _choices(row)
    return {
        "activity_label": label,
        "ctx_a": whole,
        "ctx_b": cut,
        "endings": endings,
        "label": str(_right(row, endings)),
    }


def _piqa(row: Row) -> dict[str, Any]:
    first, second = choices = _choices(row, 2)
    return {"goal": _text(row, "question"), "sol1": first, "sol2": second, "label": _right(row, choices)}


def _winogrande(row: Row) -> dict[str, Any]:
    """Both contexts are the sentence up to its gap with an option in it; the options begin where the contexts part."""
    first, second = choices = _choices(row, 2)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    begin = first[: sum(1 for _ in alike)]
    if "_" in begin:
        raise ValueError("the context holds an underscore, which the harness would read as the gap")
    return {
        "sentence": f"{begin}_ {_text(row, 'continuation')}",
        "option1": first[len(begin) :],
        "option2": second[len(begin) :],
        "answer": str(_right(row, choices) + 1),
    }


def _mmlu(row: Row) -> dict[str, Any]:
    choices = _choices(row, 4)
    return {
        "question": _text(row, "question"),
        "subject": _text(row, "subject"),
        "choices": choices,
        "answer": _right(row, choices),
    }


TASKS = {
    task.name: task
    for task in (
        Task("arc_challenge", "arc", "test", "arc_challenge_test.jsonl", _lettered("question"), "acc_norm"),
        Task("arc_easy", "arc", "test", "arc_easy_test.jsonl", _lettered("question"), "acc_norm"),
        Task("boolq", "super_glue/boolq", "validation", "boolq_valid.jsonl", _boolq, "acc"),
        Task("hellaswag", "hellaswag", "validation", "hellaswag_val.jsonl", _hellaswag, "acc_norm"),
        Task("openbookqa", "openbookqa", "test", "openbookqa_test.jsonl", _lettered("question_stem"), "acc_norm"),
        Task("piqa", "piqa", "validation", "piqa_valid.jsonl", _piqa, "acc_norm"),
        Task("winogrande", "winogrande", "validation", "winogrande_dev.jsonl", _winogrande, "acc"),
        Task("mmlu", "mmlu/default", "test", "mmlu_test.jsonl", _mmlu, "acc"),
    )
}
SEVEN = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "winogrande",
)  # of the paper's average
COMMONSENSE = (*SEVEN, "mmlu")


def find_tasks(names: str) -> list[Task]:
    """Returns the tasks of `--tasks`: names with commas between them, `commonsense` for the paper's eight.

    Raises:
        ConfigError: no such task.
    """
    found: dict[str, Task] = {}
    for name in (each.strip() for each in names.split(",")):
        if name != "commonsense" and name not in TASKS:
            raise ConfigError(
                f"--tasks {names}: unknown task {name!r}; did you mean {nearest(name, ['commonsense', *TASKS])}? "
                f"Known: commonsense, {', '.join(TASKS)}"
            )
        found |= {each: TASKS[each] for each in (COMMONSENSE if name == "commonsense" else (name,))}
    return list(found.values())


def local_rows(task: Task, folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a task's local file in the fields of the harness's data set.

    Raises:
        DataError: no such file, none in it, or a line that is not a row of this task.
    """
    file = folder / task.file
    if not file.is_file():
        raise DataError(f"--tasks {task.name}: no {task.file} in --data-dir {folder}; add it, or remove the task")
    rows = []
    with reading(file):
        for number, line in lines(file):
            if line.isspace():
                continue
            try:
                rows.append(task.fields(json.loads(line)))
            except KeyError as error:
                reason = f"no field {error}"
            except (TypeError, ValueError) as error:
                reason = str(error)
            else:
                continue
            raise DataError(f"data {file}, line {number}: not a row of {task.name} ({reason}); fix or remove the line")
    if not rows:
        raise DataError(f"data {file}: empty; write one row per line")
    return rows
