"""What pruning costs a step, the pruning phase and the peak memory, at SmolLM-135M's shape.

    python benchmarks/steps.py [steps] [phase] [memory] [bf16]      # by default all three in float32, some 40 minutes

Our Trainer over random weights and a row of 512 tokens a step, on a CPU with two threads. Sides alternate in one
process, so that what else runs on the machine slows them all. On a GPU: bf16, and 16 rows of 2,048 tokens a step.

The phase goes to a quarter of the parameters in 24 steps, beside plain steps at every shape that it passes (the ideal),
and beside LLM-Shearing's way: the same pruning, the weights zeroed and kept, nothing compacted before the end. Query
heads may not go here, in either: their groups are compacted at once, mask or not.
"""

import sys
from dataclasses import replace
from statistics import median

import torch
from rich.progress import track
from shapes import (
    alternate,
    child,
    make_model,
    make_trainer,
    one_process,
    peak_bytes,
    quiet,
    ratios,
    show,
    train_step,
)

from efficientllm.pruning import LinearPace, SlotPace
from efficientllm.pruning.schedule import Pace
from efficientllm.space import find_limits, find_space
from efficientllm.training.trainer import Trainer

SHAPE = "SmolLM-135M"
GPU = torch.cuda.is_available()
ROWS, MICRO, SEQ_LEN = (16, 8, 2048) if GPU else (1, 1, 512)
ROUNDS = 8
SHARE, PHASE_STEPS, PHASE_WARMUP = 0.25, 25, 1
NEVER = 2**30  # units that wait for one compaction
ASKED = {"A": "1.03" if GPU else "1.05", "B": "1.15" if GPU else "1.30"}


def pruned(precision: str, pace: Pace, compensate: bool = False, masks: bool = False) -> Trainer:
    """Returns a Trainer that prunes to a quarter; with `masks` at the source's shape to the end."""
    model, engine = make_model(SHAPE), one_process(precision)
    if masks:
        engine.compaction_tile = NEVER
    space = find_space(model)
    limits = find_limits(space, model.config)
    limits = replace(limits, floor={**limits.floor, "query": limits.source["query"]})
    target = int(SHARE * space.num_params(space.shape))
    pruning = {"target": target, "pace": pace, "limits": limits, "compensate": compensate}
    return make_trainer(model, engine, rows=ROWS, seq_len=SEQ_LEN, micro_batch_size=MICRO, **pruning)


def plain(precision: str, shape: dict[str, int] | None = None) -> Trainer:
    model, engine = make_model(SHAPE, shape), one_process(precision)
    return make_trainer(model, engine, rows=ROWS, seq_len=SEQ_LEN, micro_batch_size=MICRO)


def removal_step(precision: str, compensate: bool) -> str:
    """Returns the ratio of a step with one removal to the plain step beside it."""
    one, other = pruned(precision, SlotPace(1, 2, equal=True), compensate), plain(precision)
    sides = {"pruned": lambda: train_step(one), "plain": lambda: train_step(other)}
    found = alternate(sides, ROUNDS, warmup=3)
    assert len(one.pruner.removals) == ROUNDS + 1
    return f"{ratios(found['pruned'], found['plain'])[1]}; {median(found['plain']):.3f} s plain"


def phase(precision: str, compensate: bool) -> list[tuple[str, str, str]]:
    """Returns a pruning phase against plain steps at the live shapes, and (A alone) against masks."""
    pace = LinearPace(PHASE_STEPS, PHASE_WARMUP)
    sides = {"pruning": pruned(precision, pace, compensate)}
    if not compensate:
        sides["masks"] = pruned(precision, pace, masks=True)
    seconds = dict.fromkeys((*sides, "ideal"), 0.0)
    for trainer in sides.values():
        for _ in range(PHASE_WARMUP):
            train_step(trainer)
    pruner = sides["pruning"].pruner
    widths = []
    for step in track(range(PHASE_STEPS - PHASE_WARMUP), f"phase, {'B' if compensate else 'A'}"):
        ideal = plain(precision, pruner.shape)
        train_step(ideal)  # makes the moments
        before = train_step(ideal)
        for name in sides if step % 2 else reversed(sides):
            widths += [sides[name].pruner.space.shape] if name == "masks" else []
            seconds[name] += train_step(sides[name])
        seconds["ideal"] += (before + train_step(ideal)) / 2
    assert pruner.done
    of = ", ".join(f"{name} {each:.1f} s" for name, each in seconds.items())
    name = f"phase {'B' if compensate else 'A'}, over "
    rows = [(name + "ideal", f"{seconds['pruning'] / seconds['ideal']:.3f} ({of})", "" if compensate else "1.08")]
    if not compensate:
        assert all(width == widths[0] for width in widths) and sides["masks"].pruner.done
        kinds = [[removal.kind for removal in trainer.pruner.removals] for trainer in sides.values()]
        same = sum(one == other for one, other in zip(*kinds, strict=False)) / len(kinds[0])
        rows.append((name + "masks", f"{seconds['pruning'] / seconds['masks']:.3f}", "0.72"))
        shapes = " and ".join(" ".join(map(str, trainer.pruner.shape.values())) for trainer in sides.values())
        rows.append(("removals", f"{len(kinds[0])}, {same:.0%} of them of the masks' kind; shapes {shapes}", ""))
    return rows


def peak(kind: str, precision: str) -> int:
    """Returns the peak bytes of the first steps of a pruning phase, in this process; no later shape needs more."""
    pace = LinearPace(PHASE_STEPS, PHASE_WARMUP)
    trainer = plain(precision) if kind == "plain" else pruned(precision, pace, compensate=kind == "B")
    for _ in range(PHASE_STEPS // 3):
        train_step(trainer)
    return peak_bytes()


def steps(precision: str) -> list[tuple[str, str, str]]:
    return [(f"a step with a removal, {name}", removal_step(precision, name == "B"), ASKED[name]) for name in ASKED]


def phases(precision: str) -> list[tuple[str, str, str]]:
    return phase(precision, compensate=False) + phase(precision, compensate=True)


def memory(precision: str) -> list[tuple[str, str, str]]:
    peaks = {kind: int(child(__file__, kind, precision)) for kind in ("plain", "A", "B")}
    rows = []
    for name in ("A", "B"):
        of = f"{peaks[name] / 1e9:.2f} GB to {peaks['plain'] / 1e9:.2f} GB"
        rows.append((f"memory, {name}", f"{peaks[name] / peaks['plain']:.3f} ({of})", "1.10" if name == "A" else ""))
    return rows


def main(words: list[str]) -> None:
    parts = {"steps": steps, "phase": phases, "memory": memory}
    for name in [each for each in parts if each in words] or parts:
        show(parts[name]("bf16" if "bf16" in words or GPU else "float32"))


if __name__ == "__main__":
    quiet()
    if sys.argv[1:2] == ["--child"]:
        print(peak(sys.argv[2], sys.argv[3]))
    else:
        main(sys.argv[1:])
