"""Plain training: ours, a bare PyTorch loop and the Hugging Face Trainer, side by side in one process.

    python benchmarks/throughput.py [speed] [memory] [recompute] [checkpoint] [float32] [bf16]     # all: 45 minutes

SmolLM-135M's shape with random weights, AdamW (fused), gradients clipped at 1, the same micro-batches. Speed: 2 rows of
512 tokens a step, one row a pass. Memory: rows of 2,048 tokens, each side in a process of its own. Recompute: both, of
ours, by what the backward pass computes again. Checkpoint: how long `save` blocks a run, and how much longer the steps
take until it is whole.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shapes import (
    alternate,
    child,
    find_device,
    make_model,
    make_trainer,
    now,
    one_process,
    peak_bytes,
    quiet,
    random_rows,
    ratios,
    show,
    timed,
    train_step,
)
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from efficientllm.config.run_config import CHECKPOINTING
from efficientllm.distributed.checkpoint import Checkpoints

SHAPE = "SmolLM-135M"
ROWS, SEQ_LEN, ROUNDS, WARMUP = 2, 512, 6, 1
LONG = 2048  # tokens of a row where memory is measured
SIDES = ("ours", "bare", "trainer")


def bare_step(model: Any, rows: int, seq_len: int, micro_batch_size: int, bf16: bool) -> Callable[[], None]:
    """Returns a step of the loop that everyone writes."""
    device = find_device()
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    feed = random_rows(model.config.vocab_size, rows, seq_len, device)

    def step() -> None:
        parts = next(feed).split(micro_batch_size)
        for part in parts:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = model(input_ids=part, labels=part).loss
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Between(TrainerCallback):
    """Times the steps of the Hugging Face Trainer, and does something else between them."""

    def __init__(self, otherwise: Callable[[], None]) -> None:
        self.otherwise = otherwise
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.left = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.left)
        self.otherwise()
        self.left = now()


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, feed: Iterator[Tensor], count: int) -> None:
        self.rows = [next(feed)[0] for _ in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def run_trainer(
    model: Any, rows: int, seq_len: int, micro_batch_size: int, bf16: bool, steps: int, callback: TrainerCallback
) -> None:
    """Trains with the Hugging Face Trainer, its settings as they come, logs and files off."""
    feed = random_rows(model.config.vocab_size, 1, seq_len, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=rows // micro_batch_size,
            max_steps=steps,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),  # else it refuses bf16
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = Rows(feed, steps * rows)
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()


def speed(precision: str) -> dict[str, list[float]]:
    """Returns the seconds of every step of each side."""
    bf16 = precision == "bf16"
    bare = bare_step(make_model(SHAPE), ROWS, SEQ_LEN, 1, bf16)
    ours = make_trainer(make_model(SHAPE), one_process(precision), rows=ROWS, seq_len=SEQ_LEN)
    sides = {"ours": lambda: train_step(ours), "bare": lambda: timed(bare)}
    found: dict[str, list[float]] = {"ours": [], "bare": []}

    def others() -> None:
        for name in sides if len(found["ours"]) % 2 else reversed(sides):
            found[name].append(sides[name]())

    between = Between(others)
    run_trainer(make_model(SHAPE), ROWS, SEQ_LEN, 1, bf16, WARMUP + ROUNDS, between)
    return {name: seconds[WARMUP:] for name, seconds in {**found, "trainer": between.seconds}.items()}


def memory(side: str, precision: str, micro_batch_size: int) -> int:
    """Returns the peak bytes of two steps of one pass, in this process."""
    rows, bf16, model = micro_batch_size, precision == "bf16", make_model(SHAPE)
    if side != "trainer":
        again = side if side in CHECKPOINTING else None
        engine = one_process(precision)
        trainer = make_trainer(model, engine, rows=rows, seq_len=LONG, micro_batch_size=rows, recompute=again)
        train_step(trainer), train_step(trainer)
    else:
        run_trainer(model, rows, LONG, rows, bf16, 2, TrainerCallback())
    return peak_bytes()


def checkpoint(precision: str) -> list[tuple[str, str, str]]:
    """Returns how long `save` blocks, and the ratio of steps beside its writing to steps without."""
    trainer = make_trainer(make_model(SHAPE), one_process(precision), rows=ROWS, seq_len=SEQ_LEN)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), 0)
        blocked, ratio, during = [], [], 0
        train_step(trainer)
        for _ in range(4):
            plain = [train_step(trainer) for _ in range(2)]
            state, extra = trainer.state()
            start = now()
            checkpoints.save(trainer.tensors(), state, extra, trainer.model.config)
            blocked.append(now() - start)
            beside = []
            while any(Path(folder).glob(".*.partial")):
                beside.append(train_step(trainer))
            checkpoints.finish()
            plain += [train_step(trainer) for _ in range(2)]
            ratio.append((sum(beside) / len(beside)) / (sum(plain) / len(plain)))
            during += len(beside)
        size = sum(file.stat().st_size for file in next(Path(folder).glob("step-*")).rglob("*") if file.is_file())
    text = f"{median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f}, {during} steps beside 4 checkpoints)"
    seconds = f"{median(blocked):.2f} s ({min(blocked):.2f} to {max(blocked):.2f}) for {size / 1e9:.2f} GB"
    return [(f"{precision}, a step beside a checkpoint", text, ""), ("save blocks", seconds, "")]


def compare_speed(precision: str) -> list[tuple[str, str, str]]:
    found = speed(precision)
    tokens = {side: f"{ROWS * SEQ_LEN / median(found[side]):,.0f} tokens/s" for side in SIDES}
    rows = [(f"{precision}, ours over {side}", ratios(found[side], found["ours"])[1], "1.0") for side in SIDES[1:]]
    return [*rows, ("of", ", ".join(f"{side} {each}" for side, each in tokens.items()), "")]


def compare_memory(precision: str) -> list[tuple[str, str, str]]:
    rows = []
    for size in (1, 2):
        peaks = {side: int(child(__file__, side, precision, str(size))) for side in ("ours", "trainer")}
        of = ", ".join(f"{side} {peak / 1e9:.2f} GB" for side, peak in peaks.items())
        name = f"memory, {precision}, {size} x {LONG} tokens a pass"
        rows.append((name, f"{peaks['ours'] / peaks['trainer']:.3f} ({of})", "0.8"))
    return rows


def compare_recompute(precision: str) -> list[tuple[str, str, str]]:
    trainers = {
        how: make_trainer(make_model(SHAPE), one_process(precision), rows=ROWS, seq_len=SEQ_LEN, recompute=how)
        for how in CHECKPOINTING
    }
    found = alternate({how: partial(train_step, each) for how, each in trainers.items()}, ROUNDS)
    rows = []
    for how in CHECKPOINTING:
        peak = int(child(__file__, how, precision, "1"))
        text = f"{ratios(found[how], found['none'])[1]}; {peak / 1e9:.2f} GB with 1 x {LONG} tokens"
        rows.append((f"{precision}, time of a step with {how} over none", text, ""))
    return rows


def main(words: list[str]) -> None:
    parts = {
        "speed": compare_speed,
        "memory": compare_memory,
        "recompute": compare_recompute,
        "checkpoint": checkpoint,
    }
    precisions = ("float32", "bf16") if find_device().type == "cpu" else ("bf16",)
    for precision in [each for each in precisions if each in words] or precisions:
        for name in [each for each in parts if each in words] or parts:
            show(parts[name](precision))


if __name__ == "__main__":
    quiet()
    if sys.argv[1:2] == ["--child"]:
        print(memory(sys.argv[2], sys.argv[3], int(sys.argv[4])))
    else:
        main(sys.argv[1:])
