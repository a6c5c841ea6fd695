"""Runs under torchrun: every engine of this number of ranks against one process, case by case; see test_engine.py."""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from efficientllm.baselines.one_shot import remove_one_shot
from efficientllm.config.run_config import RunConfig
from efficientllm.distributed.checkpoint import Checkpoint, Checkpoints, last_checkpoint
from efficientllm.distributed.engine import Engine
from efficientllm.distributed.parallel import DDP, FSDP
from efficientllm.errors import TrainingError
from efficientllm.models.load import empty_model
from efficientllm.pruning import Removal
from efficientllm.space import find_limits, find_space
from efficientllm.space.dims import of_kind
from efficientllm.training.loss import chunked_loss_
from efficientllm.training.recipe import make_recipe
from efficientllm.training.size_target import Budget
from efficientllm.training.trainer import Trainer
from helpers.families import VOCAB, make_model

ROWS, LENGTH, STEPS, PRUNE, BREAK = 8, 12, 60, 45, 25
CPU = torch.device("cpu")
ONE_SHOT = ("one-shot", "one-shot-obs", "activation", "magnitude")


def make_trainer(
    engine: Engine, name: str, compensate: bool, checkpoint: Checkpoint | None = None, **more: Any
) -> Trainer:
    """A tiny model in float64 that must lose units of every kind; each rank sees its own rows of the same batches."""
    source = make_model(name)
    space = find_space(source, more.get("layout") == "per-layer")
    limits = find_limits(space, source.config, min_ffn=24, min_hidden=12)
    config = RunConfig(
        seq_len=LENGTH,
        batch_tokens=ROWS * LENGTH,
        micro_batch_size=ROWS // engine.num_ranks // 2,
        target_params=int(
            1.02 * space.num_params({**limits.floor, **dict.fromkeys(of_kind(limits.floor, "query"), 1)})
        ),
        prune_tokens=PRUNE * ROWS * LENGTH,
        tokens=STEPS * ROWS * LENGTH,
        lr=3e-3,
        compensate=compensate,
        **more,
    )
    recipe = replace(make_recipe(config, space, limits), weight_decay=0.1, warmup_steps=2)
    engine.compaction_tile = 4
    model = empty_model(checkpoint.config(), "checkpoint").double() if checkpoint else source
    teacher = make_model(name) if config.distill else None
    trainer = Trainer(model, config, recipe, limits, engine, lambda size: None, teacher=teacher)
    if checkpoint:
        trainer.restore(checkpoint)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator) for _ in range(STEPS)]
    trainer.batches = iter([batch[engine.rank :: engine.num_ranks] for batch in batches[trainer.step :]])
    return trainer


def train(trainer: Trainer, steps: int) -> list[float]:
    """Returns the losses up to a step."""
    while trainer.step < steps:
        trainer.train_step()
    return [row["loss"] for row in trainer.metrics.settle()]


def save(trainer: Trainer, folder: Path) -> Checkpoint:
    """Writes a checkpoint as a run does; all ranks of the trainer's engine come here."""
    engine = trainer.engine
    checkpoints = Checkpoints(folder, 0) if engine.num_ranks > 1 else alone(lambda: Checkpoints(folder, 0))
    checkpoints.save(engine.checkpoint_shard(trainer.tensors()), *trainer.state(), trainer.model.config)
    train(trainer, trainer.step + 1)  # goes on while it is written; what is saved must not move with it
    checkpoints.finish()
    engine.barrier()
    found = last_checkpoint(folder)
    assert found is not None
    return found


def alone(make: Any) -> Any:
    """Lets one process of several take itself for the only one."""
    initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        return make()
    finally:
        dist.is_initialized = initialized


def result(trainer: Trainer, losses: list[float], removals: list[Removal]) -> dict[str, Any]:
    trainer.pruner.close()
    plain = trainer.engine.gather(trainer.model)
    return {
        "removals": [(removal.kind, removal.units) for removal in removals],
        "losses": losses,
        "shape": trainer.pruner.shape,
        "weights": {key: param.detach().clone() for key, param in plain.named_parameters()}
        if trainer.engine.is_main
        else {},
    }


def whole(engine: Engine, name: str, compensate: bool, **more: Any) -> dict[str, Any]:
    """A run that is never interrupted."""
    trainer = make_trainer(engine, name, compensate, **more)
    losses = train(trainer, STEPS)
    return result(trainer, losses, trainer.pruner.removals)


def one_shot(engine: Engine, name: str, method: str) -> dict[str, Any]:
    """A run that loses everything before its first step, by scores over eight batches, and trains for a few."""
    allocation = "uniform" if method == "one-shot-obs" else "global"
    trainer = make_trainer(
        engine, name, False, method=method, allocation=allocation, calibration_tokens=8 * ROWS * LENGTH
    )
    budget = Budget(trainer.pruner.measure, trainer.pruner.target_params)
    remove_one_shot(trainer, budget, lambda done, batches: None)
    losses = train(trainer, 6)
    return result(trainer, losses, trainer.pruner.removals)


def moved(before: Engine, after: Engine, name: str, folder: Path, **more: Any) -> dict[str, Any]:
    """A run that begins on one engine, is saved while units wait to be compacted, and ends on another."""
    first = make_trainer(before, name, False, **more)
    losses = train(first, BREAK)
    removals = list(first.pruner.removals)
    assert first.pruner.state_dict()["retired"], "nothing waits: choose another step"
    checkpoint = save(first, folder)
    last = make_trainer(after, name, False, checkpoint, **more)
    losses += train(last, STEPS)
    return result(last, losses, removals + last.pruner.removals)


def main(out: Path, engines: list[str], names: list[str]) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    ranks = DDP(CPU)  # the ranks meet
    folder = Path(shared_folder(ranks))

    def one_process(work: Callable[..., dict[str, Any]], *args: Any, **more: Any) -> dict[str, Any]:
        """What one process gives: the main rank asks it, and the others need not."""
        return work(Engine(CPU), *args, **more) if ranks.is_main else {}

    def check(case: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
        if ranks.is_main:
            results[case] = compare(expected, found)
            out.write_text(json.dumps(results, indent=1))

    for name in names:
        for compensate in (False, True):
            expected = one_process(whole, name, compensate)
            for kind in engines:
                found = whole(make_engine(kind), name, compensate)
                check(f"{kind} {name} {'B' if compensate else 'A'}", expected, found)
            if name != names[0] or compensate:
                continue
            # what the rest of a run can be asked for, at once; F needs the same rows in every micro-batch of all ranks
            more = {
                "saliency": "taylor2",
                "score_ema": 0.5,
                "scored_layers": "all",
                "activation_checkpointing": "selective",
            }
            expected_more = one_process(whole, name, True, **more)
            for kind in engines:
                check(f"{kind} {name} fisher", expected_more, whole(make_engine(kind), name, True, **more))
            per_layer = {"layout": "per-layer", "activation_checkpointing": "full"}
            expected_layers = {each: one_process(whole, name, each, **per_layer) for each in (False, True)}
            for kind in engines:
                found = whole(make_engine(kind), name, True, **per_layer)
                check(f"{kind} {name} per-layer B", expected_layers[True], found)
                found = moved(make_engine(kind), make_engine(kind), name, folder / f"layers-{kind}", **per_layer)
                check(f"{kind} {name} per-layer A, resumed", expected_layers[False], found)
            for method in ONE_SHOT:
                expected_method = one_process(one_shot, name, method)
                for kind in engines:
                    check(f"{kind} {name} {method}", expected_method, one_shot(make_engine(kind), name, method))
            taught = {"distill": "source", "distill_temperature": 2.0, "distill_hidden": 0.3}
            expected_taught = one_process(whole, name, False, **taught)
            for kind in engines:
                check(f"{kind} {name} taught", expected_taught, whole(make_engine(kind), name, False, **taught))
            for kind in engines:
                # one process is every rank by itself, each with a folder of its own
                own = folder / f"{kind}-{name}-{ranks.rank}"
                found = moved(make_engine(kind), Engine(CPU), name, folder / f"{kind}-{name}")
                check(f"{kind} to one {name}", expected, found)
                check(f"one to {kind} {name}", expected, moved(Engine(CPU), make_engine(kind), name, own))
    results["disagreement"] = {"error": disagreement(ranks)}
    results["bf16"] = half_precision()
    results["bf16 taught"] = half_precision(distill="source", distill_hidden=0.3)
    results["room"] = {kind: settled_room(kind) for kind in (*engines, "one")}
    if ranks.is_main:
        out.write_text(json.dumps(results, indent=1))
    ranks.close()


def shared_folder(engine: Engine) -> str:
    """Returns a folder that all ranks know."""
    names = [tempfile.mkdtemp()] if engine.is_main else [None]
    dist.broadcast_object_list(names, 0)
    return str(names[0])


def disagreement(engine: Engine) -> str:
    """Returns what is said when a rank has other scores than the rest: the negative control of what is compared."""
    removal = Removal(3, "ffn", {"layers.0.ffn": engine.rank}, {}, 10, 9)
    try:
        engine.check_same([removal])
    except TrainingError as error:
        return str(error)
    return "nothing"


def half_precision(**more: Any) -> dict[str, Any]:
    """FSDP in bf16: what is gathered for the products, and what is kept; of the teacher too, if there is one."""
    engine = FSDP(CPU, "bf16", shards=dist.get_world_size())
    trainer = make_trainer_float32(engine, **more)
    gathered: list[str] = []
    projection = trainer.model.model.layers[0].mlp.up_proj
    projection.register_forward_hook(lambda module, args, output: gathered.append(str(module.weight.dtype)))
    losses = train(trainer, 8)
    exact = train(make_trainer_float32(Engine(CPU), **more), 8)
    kept = {str(tensor.dtype) for tensor in trainer.tensors().values()}
    found = {"gathered": sorted(set(gathered)), "kept": sorted(kept), "losses": losses, "exact": exact}
    if trainer.teacher:
        layers = list(trainer.teacher.model.model.layers.parameters())
        found["frozen"] = {
            "dtypes": sorted({str(param.dtype) for param in trainer.teacher.model.parameters()}),
            "share": sum(engine.local(param).numel() for param in layers) / sum(param.numel() for param in layers),
        }
    return found


def room(engine: Engine) -> dict[str, int]:
    """Returns the most bytes that a compaction takes beside what stood here before, and what they are bounded by."""
    gc.collect()  # what other cases left would be freed under the profiler's eyes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:  # releases too, if from the start
        model = make_model(
            "llama-tied", dtype=torch.float32, hidden_size=120, intermediate_size=360, num_hidden_layers=8
        )
        space = find_space(model)
        held = sum(param.numel() for param in model.parameters())
        largest = max(param.numel() for param in model.parameters())
        chunked_loss_(model)
        model = engine.wrap(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = torch.randint(0, VOCAB, (2, LENGTH))
        engine.forward(model)(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        engine.barrier()
        let_go(engine)
        with record_function("compaction"):
            model = engine.compact(model, optimizer, space, {"hidden": list(range(16))})
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    events = sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (span,) = [event for event in events if event.name() == "compaction"]
    changes = [event for event in events if event.name() == "[memory]"]
    before = sum(event.nbytes() for event in changes if event.start_ns() < span.start_ns())
    during = [event.nbytes() for event in changes if span.start_ns() <= event.start_ns() <= span.end_ns()]
    return {"peak": max(accumulate(during)), "before": before, "largest": 4 * largest, "all": 16 * held}


def settled_room(kind: str) -> dict[str, int]:
    """Returns the most that a compaction took in four tries, and the least that stood there before.

    gloo's threads may keep a few buffers through a try; what is left of the source would be there in each.
    """
    tries = [room(make_engine(kind)) for _ in range(4)]
    return {**tries[0], "peak": max(each["peak"] for each in tries), "before": min(each["before"] for each in tries)}


def let_go(engine: Engine) -> None:
    """Gives the first rank's gloo threads small things to hold: each keeps the buffers of its last collective.

    The other ranks come late, so that one thread is still waiting for them when the next takes its part.
    """
    for group in engine.mesh.get_all_groups() if isinstance(engine, FSDP) else ():
        dist.barrier()
        time.sleep(0.3 if dist.get_rank() else 0)
        works = [dist.all_reduce(torch.zeros(1), group=group, async_op=True) for _ in range(8)]
        for work in works:
            work.wait()


def make_trainer_float32(engine: Engine, **more: Any) -> Trainer:
    source = make_model("qwen2", dtype=torch.float32)
    space = find_space(source)
    limits = find_limits(space, source.config)
    tokens = ROWS * LENGTH
    config = RunConfig(
        seq_len=LENGTH,
        batch_tokens=tokens,
        micro_batch_size=1,
        target_params=space.num_params(limits.source),
        prune_tokens=tokens,
        tokens=100 * tokens,
        **more,
    )
    teacher = make_model("qwen2", dtype=torch.float32, seed=1) if config.distill else None
    recipe = make_recipe(config, space, limits)
    trainer = Trainer(source, config, recipe, limits, engine, lambda size: None, teacher=teacher)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator) for _ in range(8)]
    trainer.batches = iter([batch[engine.rank :: engine.num_ranks] for batch in batches])
    return trainer


def make_engine(kind: str) -> Engine:
    if kind == "one":
        return Engine(CPU)
    return DDP(CPU) if kind == "ddp" else FSDP(CPU, shards=2 if kind == "hsdp" else dist.get_world_size())


def compare(alone: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Returns how far a run is from that of one process."""
    losses = torch.tensor([alone["losses"], found["losses"]], dtype=torch.float64)
    weights = alone["weights"]
    same_names = weights.keys() == found["weights"].keys()
    return {
        "removals": len(alone["removals"]),
        "kinds": sorted({kind for kind, _ in alone["removals"]}),
        "same_removals": alone["removals"] == found["removals"],
        "loss": float(((losses[0] - losses[1]) / losses[0]).abs().max()),
        "weights": max(float((weights[key] - found["weights"][key]).abs().max()) for key in weights)
        if same_names and alone["shape"] == found["shape"]
        else None,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","))
