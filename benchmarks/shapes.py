"""What the benchmarks share: published shapes with random weights, our Trainer over them, clocks and ratios."""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from efficientllm.config.run_config import RunConfig
from efficientllm.distributed.device import default_checkpointing, default_threads, find_device
from efficientllm.distributed.engine import Engine
from efficientllm.models.llama_mistral import mistral_config
from efficientllm.pruning import LinearPace
from efficientllm.pruning.schedule import Pace
from efficientllm.space import Limits, find_limits, find_space
from efficientllm.space.dims import Shape
from efficientllm.training.recipe import make_recipe
from efficientllm.training.trainer import Trainer

# hidden size, feed-forward width, layers, heads, key-value heads, vocabulary, tied: from the models' config.json
SHAPES = {
    "tiny": (64, 192, 2, 4, 2, 512, True),
    "small": (384, 1024, 8, 6, 2, 8192, True),
    "SmolLM-135M": (576, 1536, 30, 9, 3, 49152, True),
    "SmolLM-360M": (960, 2560, 32, 15, 5, 49152, True),
    "SmolLM-1.7B": (2048, 8192, 24, 32, 32, 49152, True),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
}


# CLOCK=cpu OMP_NUM_THREADS=1 for a machine that others use too: what one thread computes takes as long there as alone
CLOCK = time.process_time if os.environ.get("CLOCK") == "cpu" else time.perf_counter

FREES = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # bytes from which glibc asks the system and gives back


def llama(name: str) -> LlamaConfig:
    hidden, ffn, layers, heads, kv, vocab, tied = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )


def make_model(name: str, shape: Shape | None = None) -> Any:
    """Returns a model with random weights; at a shape on the way a Mistral, for Llama's config refuses most of them."""
    torch.manual_seed(0)
    with find_device():  # a GPU draws billions of weights in no time
        if shape is None:
            return LlamaForCausalLM(llama(name))
        config = mistral_config(llama(name))
        config.hidden_size, config.intermediate_size = shape["hidden"], shape["ffn"]
        config.num_key_value_heads, config.num_attention_heads = shape["kv"], shape["kv"] * shape["query"]
        return MistralForCausalLM(config)


def make_trainer(
    model: Any,
    engine: Engine,
    *,
    rows: int,
    seq_len: int,
    micro_batch_size: int = 1,
    target: int | None = None,
    pace: Pace | None = None,
    limits: Limits | None = None,
    compensate: bool = False,
    recompute: str | None = None,
) -> Trainer:
    """Returns our Trainer over random tokens; without a target it trains plainly."""
    space = find_space(model)
    limits = limits or find_limits(space, model.config)
    batch = rows * seq_len
    config = RunConfig(
        target_params=target or space.num_params(space.shape),
        prune_tokens=batch,
        tokens=10_000 * batch,
        seq_len=seq_len,
        batch_tokens=batch,
        micro_batch_size=micro_batch_size,
        compensate=compensate,
        activation_checkpointing=recompute
        or default_checkpointing(engine.device, space.num_params(space.shape), engine.precision, engine.compiles),
        lr=5e-4,
    )
    recipe = replace(make_recipe(config, space, limits), pace=pace or LinearPace(1))
    trainer = Trainer(model, config, recipe, limits, engine, lambda size: None)
    trainer.batches = random_rows(model.config.vocab_size, rows // engine.num_ranks, seq_len, engine.device)
    return trainer


def random_rows(vocab: int, rows: int, seq_len: int, device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(0, vocab, (rows, seq_len), generator=generator).to(device)


def one_process(precision: str, compiles: bool = False) -> Engine:
    """Returns the engine of one process, on the GPU if there is one."""
    return Engine(find_device(), precision, compiles)  # type: ignore[arg-type]


def now() -> float:
    """Returns seconds, with all that a GPU was given done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCK()


def timed(function: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    start = now()
    function()
    return now() - start


def train_step(trainer: Trainer) -> float:
    """Returns the seconds of a step; on a CPU with a look at the loss, as in a run."""
    start = now()
    trainer.train_step()
    if trainer.engine.device.type == "cpu":
        trainer.metrics.settle()
    return now() - start


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Returns what each side says in every round; they take turns in going first."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        order = list(sides) if number % 2 else list(reversed(sides))
        for name in order:
            found[name].append(sides[name]())
    return {name: seconds[warmup:] for name, seconds in found.items()}


def ratios(upper: Sequence[float], lower: Sequence[float]) -> tuple[float, str]:
    """Returns the median of paired ratios, and it with their middle half as text."""
    each = sorted(a / b for a, b in zip(upper, lower, strict=True))
    quarter = len(each) // 4
    return median(each), f"{median(each):.3f} ({each[quarter]:.3f} to {each[-1 - quarter]:.3f}, {len(each)} pairs)"


def peak_bytes() -> int:
    """Returns the most memory this process has held: of the GPU, or resident.

    Not `ru_maxrss`: a child inherits its parent's.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(script: str, *words: str) -> str:
    """Returns the last line that a script prints in a process of its own, which gives back all that it frees.

    glibc would keep freed tensors in its heap, 0.8 to 1.0 GB of them here, whoever trains.
    """
    command = [sys.executable, script, "--child", *words]
    env = {**os.environ, **FREES}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, timeout=3600, check=True)
    return done.stdout.splitlines()[-1]


def machine() -> str:
    """Returns the day, the hardware and the versions that figures belong to."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        names = [
            line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
        device = f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
        device += ", CPU seconds" if CLOCK is time.process_time else ""
    import transformers

    return f"{date.today()}, {device}, torch {torch.__version__}, transformers {transformers.__version__}"


def show(rows: Sequence[tuple[str, str, str]]) -> None:
    """Prints what was measured and what was asked for."""
    table = Table("what", "measured", "asked for", title=machine())
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def quiet() -> None:
    """Silences the libraries and sets the threads of a CPU as a run does."""
    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(default_threads())
