"""`efficientllm bench`: how fast models read and write in a runtime, in how much memory, side by side."""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from efficientllm.delivery.child import in_child, peak_memory
from efficientllm.errors import ConfigError
from efficientllm.models.load import find_model, finished_model
from efficientllm.numbers import counted

ROUNDS = 3  # of which the median counts; one more, shorter, before them
FASTER = 1.05  # times as many generated tokens a second; less is noise on most machines


@dataclass(frozen=True)
class Speed:
    """What one model does in one runtime on this machine.

    Attributes:
        prompt_tokens_per_second, seconds_to_first_token: of reading the prompt in one pass.
        generated_tokens_per_second: one token at a time, through the cache.
        peak_memory: most bytes the process held, the runtime itself included.
        file_size: bytes of the weights' files.
    """

    model: str
    runtime: str
    threads: int
    prompt: int
    new: int
    prompt_tokens_per_second: float
    seconds_to_first_token: float
    generated_tokens_per_second: float
    peak_memory: int
    file_size: int


def bench(
    models: Sequence[str], *, runtime: str | None, prompt: int, new: int, as_json: bool, trust_remote_code: bool
) -> int:
    """Prints the speed of each model, each in a process of its own, and how the others compare with the first.

    Raises:
        EfficientLLMError: a model is not there, or not one for that runtime.
    """
    found = [_find(model, runtime) for model in models]
    threads = num_threads()
    speeds = []
    for model, (kind, path, files) in zip(models, found, strict=True):
        measure = {"torch": _in_torch, "llama.cpp": _in_llama_cpp, "onnx": _in_onnxruntime}[kind]
        first, rest, memory = in_child(kind, measure, path, prompt, new, threads, trust_remote_code)
        size = sum(file.stat().st_size for file in files)
        speeds.append(
            Speed(model, kind, threads, prompt, new, prompt / first, first, new / rest, memory, size)  # per second
        )
    if as_json:
        print(json.dumps([asdict(speed) for speed in speeds], indent=2))
    else:
        _print_table(speeds)
        print(*verdicts(speeds), sep="\n")
    return 0


def num_threads() -> int:
    """Returns the threads that every runtime gets: OMP_NUM_THREADS, else the cores this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _find(model: str, runtime: str | None) -> tuple[str, str, list[Path]]:
    """Returns the runtime of a model, its path or hub id, and the files of its weights."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"bench {model}: no such file; check its name")
        kind, source, files = "llama.cpp", str(path), [path]
    elif (path / "model.onnx").is_file():
        kind, source, files = "onnx", str(path), sorted(path.glob("model.onnx*"))
    else:
        kind, source = "torch", finished_model(model, "bench")
        files = sorted(find_model(source, weights=True).glob("*.safetensors"))
    if runtime not in (None, kind):
        other = {"llama.cpp": "--to gguf", "onnx": "--to onnx", "torch": "--to hf"}[str(runtime)]
        raise ConfigError(f"bench {model}: this model is for {kind}, not for {runtime}; make one with export {other}")
    if kind == "llama.cpp":
        from efficientllm.delivery.llama_cpp import require

        require(f"bench {model}")
    return kind, source, files


def verdicts(speeds: Sequence[Speed]) -> list[str]:
    """Returns how the size and speed of every model after the first compare with the first's, one line each."""
    lines = [f"compared with {speeds[0].model}:"] if len(speeds) > 1 else []
    for speed in speeds[1:]:
        size = speed.file_size / speeds[0].file_size
        faster = speed.generated_tokens_per_second / speeds[0].generated_tokens_per_second
        verdict = "smaller and faster" if faster >= FASTER else "smaller but not faster"
        if size >= 1:
            verdict = "faster but not smaller" if faster >= FASTER else "neither smaller nor faster"
        lines.append(f"{speed.model}: {size:.2f} times the size, generates {faster:.2f} times as fast: {verdict}")
    return lines


def time_rounds(
    feed: Callable[[list[int]], object], reset: Callable[[], object], vocab_size: int, prompt: int, new: int
) -> tuple[float, float]:
    """Returns the median seconds of reading the prompt, and of the new tokens after it.

    The tokens are fixed and not the model's own, so that every model and runtime does the same work.

    Args:
        feed: gives the model ids that continue what it has, and returns when the logits of the last are there.
        reset: makes the model forget.
    """
    ids = [(7919 * n) % vocab_size for n in range(prompt + new)]
    reset()
    feed(ids[: min(prompt, 8)])
    feed(ids[:1])
    first, rest = [], []
    for _ in range(ROUNDS):
        reset()
        start = time.perf_counter()
        feed(ids[:prompt])
        middle = time.perf_counter()
        for number in ids[prompt:]:
            feed([number])
        first.append(middle - start)
        rest.append(time.perf_counter() - middle)
    return statistics.median(first), statistics.median(rest)


def _in_torch(path: str, prompt: int, new: int, threads: int, trust_remote_code: bool) -> tuple[float, float, int]:
    import torch
    from transformers import DynamicCache

    from efficientllm.models.load import load_model

    torch.set_num_threads(threads)
    model = load_model(path, trust_remote_code=trust_remote_code)
    _check_context(path, model.config.max_position_embeddings, prompt + new)
    cache = DynamicCache(config=model.config)

    def reset() -> None:
        nonlocal cache
        cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def feed(ids: list[int]) -> None:
        model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    return *time_rounds(feed, reset, model.config.vocab_size, prompt, new), peak_memory()


def _in_llama_cpp(path: str, prompt: int, new: int, threads: int, trust_remote_code: bool) -> tuple[float, float, int]:
    from efficientllm.delivery.llama_cpp import open_model

    model = open_model(path, prompt + new, n_threads=threads, n_threads_batch=threads)
    _check_context(path, int(model.metadata[f"{model.metadata['general.architecture']}.context_length"]), prompt + new)
    return *time_rounds(model.eval, model.reset, model.n_vocab(), prompt, new), peak_memory()


def _in_onnxruntime(
    path: str, prompt: int, new: int, threads: int, trust_remote_code: bool
) -> tuple[float, float, int]:
    import numpy as np

    from efficientllm.delivery.onnx_runtime import Session

    session = Session(Path(path), threads)
    config = json.loads((Path(path) / "config.json").read_text())
    _check_context(path, config["max_position_embeddings"], prompt + new)
    return (
        *time_rounds(lambda ids: session(np.array([ids])), session.reset, config["vocab_size"], prompt, new),
        peak_memory(),
    )


def _check_context(path: str, context: int, asked: int) -> None:
    """Raises ConfigError if the prompt and what follows do not fit the model's context."""
    if asked > context:
        raise ConfigError(
            f"bench {path}: --prompt and --new add up to {asked} tokens, but its context is {context}; lower them"
        )


def _print_table(speeds: Sequence[Speed]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    first = speeds[0]
    table.add_column(f"prompt {first.prompt}, new {first.new}, {counted(first.threads, 'thread')}")
    for speed in speeds:
        table.add_column(speed.model, justify="right", overflow="fold")
    rows: dict[str, Callable[[Speed], str]] = {
        "runtime": lambda speed: speed.runtime,
        "prompt tokens/s": lambda speed: f"{speed.prompt_tokens_per_second:,.1f}",
        "time to first token": lambda speed: f"{speed.seconds_to_first_token * 1000:,.1f} ms",
        "generated tokens/s": lambda speed: f"{speed.generated_tokens_per_second:,.1f}",
        "peak memory": lambda speed: f"{speed.peak_memory / 1e6:,.1f} MB",
        "file size": lambda speed: f"{speed.file_size / 1e6:,.2f} MB",
    }
    for name, text in rows.items():
        table.add_row(name, *(text(speed) for speed in speeds))
    Console(highlight=False).print(table, "", sep="\n")
