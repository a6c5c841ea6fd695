"""Scores: the harness's on local files against log-likelihoods by hand, text against closed forms, what is refused."""

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from efficientllm.cli import main
from efficientllm.evaluation import perplexity
from efficientllm.evaluation.harness import Score, load_tasks, score
from efficientllm.evaluation.paper_results import same_size
from efficientllm.evaluation.perplexity import ratio, score_text, windows
from efficientllm.evaluation.tasks import COMMONSENSE, TASKS, find_tasks
from helpers.paths import DEMO_MODEL

# some cheap for the model, some dear, some of more bytes than characters: choices that lengths tell apart
WORDS = ["return", "list", "the", "item", "größe", "naïve", "zvk", "QXZJ", "xq", "%$#@!", "“item”", "———", "“”"]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def by_hand(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """The log-likelihood of a continuation, by plain transformers."""
    whole, begin = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(logits[place - 1, whole[place]].item() for place in range(begin, len(whole)))


def text(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


# One item of each task: its local row without `gold`, and the prompts that the harness's definition makes of it.


def arc(rng: random.Random) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    question, choices = text(rng, 8), [text(rng, 6) for _ in range(rng.choice((3, 4, 5)))]
    prompts = [(f"Question: {question}\nAnswer:", f" {choice}") for choice in choices]
    return {"question": question, "choices": choices}, prompts


def boolq(rng: random.Random) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    passage, question = f"{text(rng, 9)}.\nQuestion: is it", text(rng, 6)
    row = {"question": f"Passage: {passage}\nQuestion: {question}?", "choices": ["no", "yes"]}
    return row, [(f"{passage}\nQuestion: {question}?\nAnswer:", answer) for answer in (" no", " yes")]


def hellaswag(rng: random.Random) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    whole, endings = text(rng, 9).capitalize(), [text(rng, 6) for _ in range(4)]
    cut = " ".join(rng.choices([word for word in WORDS if word[-1] not in ".?!"], k=3))  # no end of a sentence in it
    if rng.random() < 0.5:  # a cut phrase is capitalised; a context of whole sentences stays as it is
        question, prompt = f"Playing: {whole}. {cut}", f"Playing: {whole}. {cut.capitalize()}"
    else:
        question = prompt = f"Playing: {whole}. {cut.capitalize()}."
    return {"question": question, "choices": endings}, [(prompt, f" {ending}") for ending in endings]


def openbookqa(rng: random.Random) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    question, choices = text(rng, 8), [text(rng, 6) for _ in range(4)]
    return {"question": question, "choices": choices}, [(question, f" {choice}") for choice in choices]


def piqa(rng: random.Random) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    row, prompts = arc(rng)
    return {**row, "choices": row["choices"][:2]}, prompts[:2]


def winogrande(rng: random.Random) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Partial evaluation: the contexts differ, and what follows them is the same."""
    begin, names, rest = text(rng, 8), rng.sample(WORDS, 2), text(rng, 6) + "."
    contexts = [f"{begin} {name}" for name in names]
    return {"choices": contexts, "continuation": rest}, [(context, f" {rest}") for context in contexts]


def mmlu(rng: random.Random) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    question, choices = text(rng, 8), [text(rng, 4) for _ in range(4)]
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    lettered = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    row = {"subject": "anatomy", "question": question, "choices": choices}
    return row, [(f"{head}{question}\n{lettered}\nAnswer:", f" {letter}") for letter in "ABCD"]


MAKERS: dict[str, Callable[[random.Random], tuple[dict[str, Any], list[tuple[str, str]]]]] = {
    "arc_challenge": arc,
    "arc_easy": arc,
    "boolq": boolq,
    "hellaswag": hellaswag,
    "openbookqa": openbookqa,
    "piqa": piqa,
    "winogrande": winogrande,
    "mmlu": mmlu,
}


def write(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / TASKS[name].file).write_text(text, encoding="utf-8")


def scored(model: Any, tokenizer: Any, folder: Path, name: str, limit: int | None = None) -> Score:
    (loaded,) = load_tasks(find_tasks(name), folder)
    return score(model, tokenizer, loaded, limit=limit, batch_size=5, advance=lambda done, total: None)


def best(values: Sequence[float], sizes: Sequence[float]) -> int:
    """The choice of the largest log-likelihood over its size."""
    return max(range(len(values)), key=lambda index: values[index] / sizes[index])


@pytest.mark.parametrize("name", COMMONSENSE)
def test_a_local_file_is_scored_as_the_harness_defines_the_task(
    name: str, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Where the best choice by hand is called right, every item must be right: one other prediction would show."""
    rng = random.Random(name)
    rows, raw, by_length, by_bytes = [], [], [], []
    asked: list[tuple[str, str]] = []
    likelihoods: list[float] = []
    while len(rows) < 12 or (TASKS[name].metric == "acc_norm" and by_length in (raw, by_bytes)):
        row, prompts = MAKERS[name](rng)
        values, choices = [by_hand(model, tokenizer, *prompt) for prompt in prompts], row["choices"]
        asked += prompts
        likelihoods += values
        rows.append(row)
        raw.append(best(values, [1] * len(values)))
        by_length.append(best(values, [len(choice) for choice in choices]))
        by_bytes.append(best(values, [len(choice.encode()) for choice in choices]))

    def found(golds: Sequence[int], limit: int | None = None) -> Score:
        write(tmp_path, name, [{**row, "gold": gold} for row, gold in zip(rows, golds, strict=True)])
        return scored(model, tokenizer, tmp_path, name, limit)

    write(tmp_path, name, [{**row, "gold": gold} for row, gold in zip(rows, raw, strict=True)])
    (loaded,) = load_tasks(find_tasks(name), tmp_path)
    score(model, tokenizer, loaded, limit=None, batch_size=5, advance=lambda done, total: None)
    (task,) = loaded.parts["tasks"].values()
    requests = sorted(task.instances, key=lambda request: (request.doc_id, request.idx))
    assert [request.args for request in requests] == asked
    assert [request.resps[0][0] for request in requests] == pytest.approx(likelihoods, rel=1e-4)
    right = found(raw)
    assert right.metrics["acc"] == (1.0, 0.0) and right.num_items == right.num_all == len(rows)
    mixed = [
        (gold + (number < 9)) % len(row["choices"]) for number, (gold, row) in enumerate(zip(raw, rows, strict=True))
    ]
    share = 1 - 9 / len(rows)
    assert found(mixed).metrics["acc"] == pytest.approx((share, math.sqrt(share * (1 - share) / (len(rows) - 1))))
    assert found(mixed, limit=9).metrics["acc"] == (0.0, 0.0)
    if TASKS[name].metric == "acc":
        assert "acc_norm" not in right.metrics
        return
    # acc_norm divides by the characters of the choice, not by its bytes, and not by the blank before it
    assert found(by_length).metrics["acc_norm"] == (1.0, 0.0) != found(raw).metrics["acc_norm"]
    assert found(by_bytes).metrics["acc_norm"][0] < 1


def test_mmlu_weighs_its_subjects_by_their_items(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = []
    for subject, number, right in (("anatomy", 6, True), ("virology", 2, False)):
        for _ in range(number):
            row, prompts = mmlu(rng)
            prompts = [(context.replace("about anatomy", f"about {subject}"), letter) for context, letter in prompts]
            values = [by_hand(model, tokenizer, *prompt) for prompt in prompts]
            rows.append({**row, "subject": subject, "gold": (values.index(max(values)) + (not right)) % 4})
    write(tmp_path, "mmlu", rows)
    found = scored(model, tokenizer, tmp_path, "mmlu")
    assert found.metrics["acc"][0] == 6 / 8 and found.num_items == 8
    assert {part: metrics["acc"][0] for part, metrics in found.parts.items()} == {
        "mmlu_anatomy": 1.0,
        "mmlu_virology": 0.0,
    }


def test_a_prompt_longer_than_the_context_is_counted(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    choices = ["a list", "an error"]
    rows = [
        {"question": "return the item " * 400, "choices": choices, "gold": 0},
        {"question": "x", "choices": choices},
    ]
    write(tmp_path, "piqa", [rows[0], {**rows[1], "gold": 1}])
    assert scored(model, tokenizer, tmp_path, "piqa").truncated == 2  # both choices of the first


# Text


def test_windows_predict_every_token_once() -> None:
    def cut(size: int, window: int) -> list[tuple[list[int], int]]:
        return [(list(ids), new) for ids, new in windows(list(range(size)), window)]

    assert cut(5, 8) == [([0, 1, 2, 3, 4], 4)]
    assert cut(8, 3) == [([0, 1, 2, 3], 3), ([3, 4, 5, 6], 3), ([4, 5, 6, 7], 1)]  # the last reaches back
    for size in range(2, 30):
        predicted = [token for ids, new in cut(size, 7) for token in ids[-new:]]
        assert predicted == list(range(1, size))


def test_text_is_scored_as_by_hand_and_as_by_the_harness(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(perplexity, "WINDOW", 24)
    monkeypatch.setattr(perplexity, "TOGETHER", 4)
    rng = random.Random(0)
    documents = [text(rng, most) for most in (3, 60, 12, 1, 40, 12, 20)]
    seen: list[int] = []
    found = score_text(model, tokenizer, documents, batch_size=3, advance=lambda done, total: seen.append(done))
    assert seen == [4, 7] and found.window == 24
    assert found.num_bytes == [len(document.encode()) for document in documents]
    short = documents[3]
    ids = torch.tensor([tokenizer(short)["input_ids"]])  # with the BOS that the tokenizer adds
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert found.num_tokens[3] == ids.shape[1] - 1
    assert found.nats[3] == pytest.approx(loss * found.num_tokens[3], rel=1e-5)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=24, add_bos_token=False)
    requests = [Instance("loglikelihood_rolling", {}, (document,), n) for n, document in enumerate(documents)]
    rolled = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found.nats == pytest.approx([-value for value in rolled], rel=1e-5)
    assert found.perplexity[0] == pytest.approx(math.exp(sum(found.nats) / sum(found.num_tokens)))
    assert found.bits_per_byte[0] == pytest.approx(sum(found.nats) / math.log(2) / sum(found.num_bytes))


def test_a_model_that_knows_nothing(tokenizer: Any) -> None:
    """Equal logits: the perplexity is the vocabulary's size, whatever the text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    blank = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes))
    torch.nn.init.zeros_(blank.lm_head.weight)
    found = score_text(blank, tokenizer, ["größe", "of the list"], batch_size=2, advance=lambda done, total: None)
    assert found.perplexity == pytest.approx((len(tokenizer), 0.0), abs=1e-2)
    tokens = sum(len(tokenizer(document)["input_ids"]) - 1 for document in ("größe", "of the list"))
    assert found.bits_per_byte[0] == pytest.approx(tokens * math.log2(len(tokenizer)) / (7 + 11), rel=1e-5)


def test_the_error_of_a_ratio() -> None:
    values = [3.0, 5.0, 4.0, 8.0]
    assert ratio(values, [2] * 4) == pytest.approx((2.5, statistics.stdev(values) / 2 / math.sqrt(4)))
    assert ratio([2.0, 4.0, 6.0], [1, 2, 3]) == (2.0, 0.0)  # equal in every document
    assert ratio([2.0], [1]) == (2.0, None)
    rng = random.Random(0)
    pairs = [(rng.gauss(2.0 * size, size), size) for size in rng.choices(range(1, 9), k=400)]
    drawn = [rng.choices(pairs, k=len(pairs)) for _ in range(400)]
    bootstrap = statistics.stdev(sum(a for a, _ in draw) / sum(b for _, b in draw) for draw in drawn)
    assert ratio(*zip(*pairs, strict=True))[1] == pytest.approx(bootstrap, rel=0.15)


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Local files of all tasks."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rng = random.Random(0)
    for name in COMMONSENSE:
        rows = [MAKERS[name](rng)[0] for _ in range(6)]
        write(folder, name, [{**row, "gold": rng.randrange(len(row["choices"]))} for row in rows])
    yield folder


def test_eval_writes_everything(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("Return the number of items.\nRaise an error.\n")
    out = tmp_path / "results.json"
    run = tmp_path / "run"  # a finished run stands for its model
    run.mkdir()
    (run / "model").symlink_to(DEMO_MODEL)
    flags = ["--data-dir", str(files), "--limit", "5", "--batch-size", "4", "--out", str(out), "--txt-split", "line"]
    flags += ["--tasks", "commonsense", "--text", str(tmp_path / "text.txt")]
    assert main(["eval", str(DEMO_MODEL), str(run), *flags]) == 0
    shown = capsys.readouterr().out
    assert "mean of 7" in shown and "ARC-c" in shown and "--limit 5" in shown and "bits per byte" in shown
    assert "none is near the size of these" in shown and "quoted:" not in shown
    found = json.loads(out.read_text())
    assert set(found["versions"]) >= {"lm_eval", "torch", "transformers", "datasets", "efficientllm"}
    assert "--limit 5" in found["command"] and found["hardware"]["threads"] >= 1
    assert found["settings"] == {"limit": 5, "batch_size": 4, "num_fewshot": 0, "data": str(files)}
    first, second = found["models"]
    assert first["params"] == 602_976 and first["tasks"] == second["tasks"] and first["texts"] == second["texts"]
    assert list(first["tasks"]) == list(COMMONSENSE)
    assert all(task["n"] == 5 and task["of"] == 6 and "acc_stderr" in task for task in first["tasks"].values())
    shown_seven = [first["tasks"][name][TASKS[name].metric] for name in COMMONSENSE if name != "mmlu"]
    assert first["average_of_seven"]["mean"] == pytest.approx(statistics.mean(shown_seven))
    (document,) = first["texts"].values()
    assert document["documents"] == 2 and document["perplexity"] == pytest.approx(math.exp(document["loss"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "run", "text.txt"]  # nothing half-made
    assert main(["eval", str(DEMO_MODEL), *flags]) == 2
    assert "exists; add --overwrite" in capsys.readouterr().err


def test_the_papers_rows_of_the_same_size() -> None:
    assert [row.model for row in same_size([602_976])] == []
    assert [row.average for row in same_size([135_000_000])] == [50.54, 49.87]
    assert [row.model for row in same_size([500_000_000])][-1] == "Qwen2.5-0.5B"
    both = same_size([1_240_000_000, 134_000_000])
    assert both[0].average == 50.54 and [row.average for row in both if "Llama" in row.model] == [56.69]
    assert same_size([7_000_000_000]) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["MODEL is missing"]),
        ("M --tasks pika", ["unknown task 'pika'", "did you mean piqa?", "commonsense"]),
        ("M --tasks piqa --data-dir nowhere", ["--data-dir nowhere", "no such folder", "piqa_valid.jsonl"]),
        ("M --tasks boolq --data-dir D", ["no boolq_valid.jsonl in --data-dir D"]),
        ("M --tasks arc_easy --data-dir D", ["arc_easy_test.jsonl, line 2", "gold is 7", "fix or remove"]),
        ("M --tasks piqa --data-dir D", ["piqa_valid.jsonl, line 1", "no field 'gold'"]),
        ("M --tasks hellaswag --data-dir D", ["hellaswag_val.jsonl: empty"]),
        ("M --tasks mmlu --data-dir D", ["mmlu_test.jsonl", "no task mmlu_alchemy"]),
        ("M --text t.txt --data-dir D", ["--data-dir D is used only with tasks"]),
        ("M --text nowhere.txt", ["'nowhere.txt' does not exist"]),
        ("M --text D/blank.txt", ["D/blank.txt: empty"]),
        ("M --limit 0", ["--limit 0 is below 1"]),
        ("M --batch-size many", ["--batch-size", "'many' is not a number"]),
        ("M M --text t.txt", ["eval M: named twice"]),
        ("D --text t.txt", ["eval D: has neither model/"]),
        ("./nowhere --text t.txt", ["no such folder"]),
        ("M --text t.txt --out t.txt", ["--out t.txt exists", "--overwrite"]),
        ("M --text t.txt --out D --overwrite", ["--out D is a folder"]),
        ("M --text t.txt --out t.txt/r.json", ["cannot be written"]),
    ],
)
def test_mistakes(
    arguments: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("M").symlink_to(DEMO_MODEL)
    Path("t.txt").write_text("Return the list.")
    row = {"question": "q", "choices": ["a", "b"], "gold": 1}
    write(Path("D"), "arc_easy", [row, {**row, "gold": 7}])
    write(Path("D"), "piqa", [{"question": "q", "choices": ["a", "b"]}])
    write(Path("D"), "hellaswag", [])
    write(Path("D"), "mmlu", [{**row, "choices": ["a", "b", "c", "d"], "subject": "alchemy"}])
    Path("D/blank.txt").write_text(" \n")
    before = sorted(Path().rglob("*"))
    assert main(["eval", *arguments.split()]) == 2
    out, error = capsys.readouterr()
    line = error.splitlines()[-1]  # the line before it says what is read
    assert out == "" and line.startswith("efficientllm: error: ") and all(word in line for word in words), error
    assert sorted(Path().rglob("*")) == before


def test_without_the_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["eval", str(DEMO_MODEL), "--tasks", "winogrande"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--tasks winogrande: the hub returned no data" in line and "--data-dir" in line
