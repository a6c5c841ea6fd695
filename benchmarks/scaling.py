"""Many ranks on this machine's CPU, and what would travel and be moved on more: speed, bytes sent, compaction.

    python benchmarks/scaling.py [speed] [sent] [compaction]        # by default all three, some 15 minutes

speed       tokens/s of 1 rank with 1 thread, 1 rank with 2, and 2 ranks with 1 thread each (gloo), the same batches
sent        bytes that a rank gives to collectives in a step, by ring algorithms, beside plain FSDP2 of the stock model;
            and those that the loopback interface really carried, which no counting in Python can miss
compaction  seconds and extra memory of cutting a tile of 64 at SmolLM-135M's shape; for 1.7B and 7B an estimate: the
            bytes that it reads and writes there (weights, gradients, two moments) at the rate measured here
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from shapes import llama, make_model, make_trainer, now, peak_bytes, quiet, ratios, show, train_step
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from efficientllm.distributed.parallel import FSDP, start_engine
from efficientllm.pruning import LinearPace, SlotPace
from efficientllm.pruning.removal import kept_entries
from efficientllm.pruning.schedule import Pace
from efficientllm.space import find_limits, find_space
from efficientllm.training.trainer import Trainer

CPU = torch.device("cpu")
ROWS, SEQ_LEN = 8, 256
ROUNDS, STEPS = 5, 6
WAYS = {"1 rank, 1 thread": (1, 1, ""), "1 rank, 2 threads": (1, 2, ""), "ddp": (2, 1, "ddp"), "fsdp": (2, 1, "fsdp")}
REPEATS = 4  # of a step whose bytes are counted
TILE = 64


def ranks(number: int, threads: int, *words: str, **variables: str) -> Any:
    """Returns what rank 0 of so many processes prints as JSON."""
    script = [__file__, "--worker", *words]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), **variables}
    if number > 1:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        script = ["-m", "torch.distributed.run", "--nproc-per-node", str(number), "--master-port", str(port), *script]
    done = subprocess.run(
        [sys.executable, *script], stdout=subprocess.PIPE, text=True, env=env, timeout=3600, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# --- speed -----------------------------------------------------------------------------------------------------------


def speed_worker(name: str) -> list[float]:
    trainer = make_trainer(
        make_model("small"), start_engine(name or "ddp", CPU), rows=ROWS, seq_len=SEQ_LEN, micro_batch_size=ROWS // 2
    )
    train_step(trainer), train_step(trainer)
    return [train_step(trainer) for _ in range(STEPS)]


def speed() -> list[tuple[str, str, str]]:
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(ROUNDS):
        for name in WAYS if number % 2 else reversed(WAYS):
            processes, threads, engine = WAYS[name]
            seconds[name].append(median(ranks(processes, threads, "speed", engine)))
    first = seconds["1 rank, 1 thread"]
    rows = []
    for name in WAYS:
        rate = f"{ROWS * SEQ_LEN / median(seconds[name]):,.0f} tokens/s"
        rows.append((f"speed, {name}", f"{rate}; over 1 rank, 1 thread {ratios(first, seconds[name])[1]}", ""))
    return rows


# --- bytes sent ------------------------------------------------------------------------------------------------------


SHARES = {  # of a collective: the argument that is whole, and how often it goes round
    "_allgather_base_": (0, 1),
    "_reduce_scatter_base_": (1, 1),
    "allreduce_": (0, 2),
    "all_reduce": (0, 2),
    "all_reduce_": (0, 2),
    "broadcast_": (0, 1),
    "reduce_scatter_tensor": (0, 1),
}
SILENT = ("wait_tensor", "_wrap_tensor_autograd", "barrier")


class Sent(TorchDispatchMode):
    """Adds up what this rank would send in rings of all ranks.

    To gather or to reduce and scatter a tensor of S bytes (n-1)/n · S, to sum it on all ranks twice that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it comes again as operations on local tensors
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            n = dist.get_world_size()
            if name == "all_gather_into_tensor":  # takes the part
                self.bytes += (n - 1) * size(args[0])
            else:  # an unknown one stops here: nothing goes uncounted
                which, times = SHARES[name]
                self.bytes += times * (n - 1) / n * size(args[which])
        return func(*args, **(kwargs or {}))


def size(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size(each) for each in tensors)


def loopback() -> int:
    """Returns the bytes that the loopback interface has carried."""
    rows = Path("/proc/net/dev").read_text().splitlines()
    return int(next(row for row in rows if row.strip().startswith("lo:")).partition(":")[2].split()[0])


def stock_fsdp(engine: FSDP) -> Any:
    """Returns a step of plain FSDP2 on the stock model."""
    model = make_model("small")
    for layer in model.model.layers:
        fully_shard(layer, mesh=engine.mesh)
    fully_shard(model, mesh=engine.mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    rows = torch.randint(0, model.config.vocab_size, (ROWS // engine.num_ranks, SEQ_LEN))

    def step() -> None:
        parts = rows.split(ROWS // 4)
        for number, part in enumerate(parts):
            model.set_requires_gradient_sync(number == len(parts) - 1)
            (model(input_ids=part, labels=part).loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sent_worker() -> dict[str, list[float]]:
    """Returns counted bytes, and bytes on the wire (of all ranks), of every kind of step."""
    engine = FSDP(CPU)
    found: dict[str, list[float]] = {}

    def count(name: str, step: Any, times: int = 1) -> None:
        step()  # the first makes the moments
        step()
        wires = []
        for _ in range(times):
            engine.barrier()
            time.sleep(0.2)
            carried = loopback()
            with Sent() as mode:
                step()
            engine.barrier()
            time.sleep(0.2)
            wires.append(loopback() - carried)
        found[name] = [mode.bytes, min(wires)]  # others use the interface too

    count("stock", stock_fsdp(engine), REPEATS)
    for name in ("between", "removal", "hidden", "ffn", "kv"):
        model = make_model("small")
        space = find_space(model)
        if name in space.bundles:  # the third step takes one tile, and compacts
            pace: Pace = LinearPace(3, 2)
            limits, target = tile_limits(space, model.config, name)
        else:
            pace = SlotPace(1, 2 + REPEATS if name == "between" else 2, equal=True)
            limits = find_limits(space, model.config)
            target = int(0.5 * space.num_params(limits.source))
        trainer = make_trainer(
            model,
            FSDP(CPU),
            rows=ROWS,
            seq_len=SEQ_LEN,
            micro_batch_size=ROWS // 4,
            target=target,
            pace=pace,
            limits=limits,
        )
        count(name, trainer.train_step, REPEATS if name == "between" else 1)
        removals = len(trainer.pruner.removals)
        assert removals == {"between": 0, "removal": 1, "kv": 1}.get(name, TILE)
        assert (trainer.pruner.space.shape != space.shape) == (name in space.bundles)
    engine.close()
    return found


def sent() -> list[tuple[str, str, str]]:
    found = ranks(2, 1, "sent")
    rows = []
    for name, text, asked in (
        ("between", "a step between removals, over stock FSDP2", "1.02"),
        ("removal", "a step with one removal", ""),
        ("hidden", f"a step that cuts {TILE} hidden", ""),
        ("ffn", f"a step that cuts {TILE} ffn", ""),
        ("kv", "a step that cuts a KV group", ""),
    ):
        counted, wire = found[name]
        more = counted - found["stock"][0]
        measured = f"{counted / found['stock'][0]:.4f} ({counted / 1e6:.2f} MB a rank, {more:+,.0f} bytes; "
        measured += f"on the wire {wire / found['stock'][1]:.4f}, {wire / 1e6:.2f} MB of both)"
        rows.append((f"sent, {text}", measured, asked))
    return rows


# --- compaction ------------------------------------------------------------------------------------------------------


def tile_limits(space: Any, config: Any, kind: str) -> tuple[Any, int]:
    """Returns limits by which nothing but one tile of a kind may go, and the size that is left."""
    limits = find_limits(space, config)
    units = max(1, TILE // space.head_dim) if kind == "kv" else TILE
    smaller = {**limits.source, kind: limits.source[kind] - units}
    return replace(limits, floor=smaller), space.num_params(smaller)


def compaction_worker(name: str, kind: str) -> dict[str, float]:
    """Returns seconds, resident bytes before and peak bytes of one compaction, the largest of any rank."""
    engine = start_engine(name or "ddp", CPU)
    model = make_model("SmolLM-135M")
    limits, target = tile_limits(find_space(model), model.config, kind)
    trainer: Trainer = make_trainer(
        model, engine, rows=2, seq_len=64, target=target, pace=LinearPace(3, 2), limits=limits
    )
    found: dict[str, float] = {}
    compact = engine.compact

    def measured(*args: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        found["before"] = peak_bytes()
        engine.barrier()
        start = now()
        result = compact(*args)
        found["seconds"] = now() - start
        found["peak"] = peak_bytes()
        return result

    engine.compact = measured  # type: ignore[method-assign]
    for _ in range(3):
        train_step(trainer)
    assert trainer.pruner.done
    found["peak"], found["before"] = engine.all_reduce_max(int(found["peak"]), int(found["before"]))
    if name:
        engine.close()
    return found


def moved_bytes(name: str, kind: str) -> int:
    """Returns what cutting a tile reads and writes: weights, gradients and two moments of all that loses entries."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(llama(name))
    space = find_space(model)
    units = {
        dim.name: list(range(max(1, TILE // space.head_dim) if kind == "kv" else TILE))
        for dim in space.bundles[kind].dims
    }
    total = 0
    params = dict(model.named_parameters())
    for param, axes in kept_entries(model, space, units).items():
        left = list(params[param].shape)
        for axis, kept in axes:
            left[axis] = len(kept)
        total += params[param].numel() + torch.Size(left).numel()
    return 4 * 4 * total


def compaction() -> list[tuple[str, str, str]]:
    rows = []
    for kind in ("hidden", "ffn", "kv"):
        moved = moved_bytes("SmolLM-135M", kind)
        for label, processes, engine in (("one process", 1, ""), ("fsdp, 2 ranks", 2, "fsdp")):
            runs = [ranks(processes, 2 // processes, "compaction", engine, kind) for _ in range(3)]
            seconds = median(run["seconds"] for run in runs)
            # slower, but what is freed is given back at once
            held = ranks(processes, 2 // processes, "compaction", engine, kind, MALLOC_MMAP_THRESHOLD_="262144")
            before, extra = held["before"], held["peak"] - held["before"]
            each = ", ".join(f"{run['seconds']:.2f}" for run in runs)
            text = f"{seconds:.2f} s (of {each}); "
            text += f"{before / 1e9:.2f} GB before, {extra / 1e6:+,.0f} MB at the peak"
            rows.append((f"compaction of {kind}, SmolLM-135M, {label}", text, ""))
            if not engine:
                rate = moved / seconds
        for name in ("SmolLM-1.7B", "Llama-2-7B"):
            moved = moved_bytes(name, kind)
            text = f"{moved / rate:.1f} s by estimate: {moved / 1e9:.1f} GB at the {rate / 1e9:.2f} GB/s of 135M"
            rows.append((f"compaction of {kind}, {name}, one process", text, ""))
    return rows


def main(words: list[str]) -> None:
    parts = {"speed": speed, "sent": sent, "compaction": compaction}
    for name in [each for each in parts if each in words] or parts:
        show(parts[name]())


if __name__ == "__main__":
    quiet()
    if sys.argv[1:2] == ["--worker"]:
        worker = {"speed": speed_worker, "sent": sent_worker, "compaction": compaction_worker}[sys.argv[2]]
        answer = worker(*sys.argv[3:])
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(answer))
    else:
        main(sys.argv[1:])
