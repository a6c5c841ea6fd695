"""Text before and after: source and result go on with the same beginnings of held-out text; kept in RUN/samples.json.

The run itself does not do this: the source is not in memory at its end, and sharded models do not generate.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientllm.errors import DataError, EfficientLLMError
from efficientllm.files import write_whole
from efficientllm.report.history import History

if TYPE_CHECKING:
    import torch

FILE = "samples.json"
NUMBER, PROMPT, NEW = 3, 24, 64  # texts, tokens of their beginnings, tokens to go on with
TEMPERATURE, SEED = 0.8, 0
SEARCHED = 1 << 20  # tokens of held-out text in which beginnings are looked for
MOST_PARAMS = 200_000_000  # of a source that a run's own report lets write: seconds on a CPU


@dataclass(frozen=True)
class Texts:
    """Samples, each with prompt, source, result and reference; and a note that says how they came, or why not."""

    samples: list[dict[str, str]]
    note: str


def stored_texts(run: History) -> Texts:
    """Returns the samples that the run folder holds of the model that stands there now."""
    try:
        found = json.loads((run.folder / FILE).read_text(encoding="utf-8"))
        if found["tokens"] == run.tokens:
            return Texts([{key: str(each[key]) for key in _KEYS} for each in found["samples"]], found["note"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if not run.finished:
        return Texts([], "Once the run has its result, source and result continue the same held-out text here.")
    return Texts([], f"None yet; efficientllm report {run.folder} lets source and result write them.")


def make_texts(run: History, trust_remote_code: bool = False) -> Texts:
    """Returns the samples of a finished run, and keeps them in its folder; if they cannot be made the note says why."""
    found = stored_texts(run)
    if found.samples or not run.finished:
        return found
    try:
        samples = _write(run, trust_remote_code)
    except EfficientLLMError as error:
        return Texts([], f"None: {error}.")
    note = (
        f"The first {PROMPT} tokens are held-out text; source and result continue it, sampled at temperature "
        f"{TEMPERATURE} with seed {SEED}."
    )
    content = {"tokens": run.tokens, "note": note, "samples": samples}
    try:
        write_whole(run.folder / FILE, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:  # another's folder: the page has them all the same
        warnings.warn(f"{run.folder / FILE} cannot be written ({error.strerror})", stacklevel=2)
    return Texts(samples, note)


def beginnings(tokens: Sequence[int], separators: set[int], number: int, length: int) -> list[int]:
    """Returns where up to `number` documents of at least `length` tokens begin, evenly over the tokens.

    Args:
        separators: ids that stand before or after documents.
    """
    starts = [0, *(n + 1 for n, token in enumerate(tokens) if token in separators)]
    ends = [*starts[1:], len(tokens) + 1]
    long = [start for start, end in zip(starts, ends, strict=True) if end - 1 - start >= length]
    if not long and len(tokens) >= length:
        long = [0]
    return [long[len(long) * each // number] for each in range(number)] if len(long) > number else long


_KEYS = ("prompt", "source", "result", "reference")


def _write(run: History, trust_remote_code: bool) -> list[dict[str, str]]:
    """Raises EfficientLLMError: no held-out text, or a model that cannot be loaded."""
    import torch

    from efficientllm.models.load import load_model, load_tokenizer

    result, source = str(run.folder / "model"), str(run.config["model"])
    tokenizer = load_tokenizer(result, trust_remote_code)
    tokens = _held_out(run)
    separators = {each for each in (tokenizer.bos_token_id, tokenizer.eos_token_id) if each is not None}
    starts = beginnings(tokens, separators, NUMBER, PROMPT + NEW // 2)
    if not starts:
        raise DataError(f"fewer than {PROMPT + NEW // 2} tokens of text are held out")
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = torch.tensor([[*opening, *tokens[start : start + PROMPT]] for start in starts])

    def text(ids: Sequence[int]) -> str:
        """Returns ids as text, up to where the document ends."""
        cut = next((n for n, each in enumerate(ids) if n and each in separators), len(ids))
        return str(tokenizer.decode(ids[:cut], skip_special_tokens=True))

    written = {}
    for name, path in (("source", source), ("result", result)):
        model = load_model(path, trust_remote_code=trust_remote_code)
        written[name] = [text(ids) for ids in _continue(model, prompts, tokenizer.eos_token_id).tolist()]
        del model  # one of them at a time in memory
    return [
        {
            "prompt": text(prompts[number].tolist()),
            "source": written["source"][number],
            "result": written["result"][number],
            "reference": text(tokens[start + PROMPT : start + PROMPT + NEW]),
        }
        for number, start in enumerate(starts)
    ]


def _continue(model: Any, prompts: "torch.Tensor", eos: int | None) -> "torch.Tensor":
    """Returns what a model adds to prompts (texts, tokens)."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    torch.manual_seed(SEED)
    made: torch.Tensor = model.generate(
        prompts.to(device),
        attention_mask=torch.ones_like(prompts).to(device),
        max_new_tokens=NEW,
        do_sample=True,
        temperature=TEMPERATURE,
        pad_token_id=0 if eos is None else eos,
    )
    return made[:, prompts.shape[1] :].cpu()


def _held_out(run: History) -> list[int]:
    """Returns held-out tokens of a run: its validation data, or what its first data set holds out.

    Raises:
        DataError: if no token shards of it are left, or nothing is held out.
    """
    from efficientllm.data.token_folder import is_prepared, open_tokens

    own = [Path(str(run.config["valid"])).expanduser()] if run.config["valid"] else []
    for path, split in (
        (run.folder / "data/valid", "all"),
        *((path, "all") for path in own),
        (run.folder / "data/train-00", "valid"),
        *((Path(spec.rpartition("=")[0] or spec).expanduser(), "valid") for spec in run.config["data"]),
    ):
        if path.is_dir() and is_prepared(path):
            shards = open_tokens(path).rows(1, split).shards  # type: ignore[arg-type]
            tokens = [int(token) for shard in shards[:1] for token in shard[:SEARCHED]]
            if tokens:
                return tokens
    raise DataError("no held-out text is left in the run folder or where its data came from")
