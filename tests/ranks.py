"""Runs under torchrun: every engine of this number of ranks against one process, case by case; see test_engine.py."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from efficientllm.errors import TrainingError
from efficientllm.pruning import LinearPace, Pruner, Removal
from efficientllm.space import find_limits, find_space
from efficientllm.training.engine import DDP, FSDP
from efficientllm.training.process import Engine
from families import VOCAB, make_model

ROWS, STEPS, PRUNE = 8, 60, 45


def train(engine: Engine, name: str, compensate: bool, steps: int = STEPS) -> dict[str, Any]:
    """Trains and prunes a tiny model; every rank sees its own rows of the same global batches."""
    model = make_model(name)
    space = find_space(model)
    limits = find_limits(space, model.config, min_ffn=16, min_hidden=12)
    model = engine.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    pruner = Pruner(
        model,
        optimizer,
        int(0.4 * space.num_params(space.shape)),
        pace=LinearPace(PRUNE, 2),
        limits=limits,
        compensate=compensate,
        compaction_tile=4,
        layout=engine,
    )
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        rows = torch.randint(0, VOCAB, (ROWS, 12), generator=generator)[engine.rank :: engine.num_ranks]
        total = torch.zeros((), dtype=torch.float64)
        for number, part in enumerate(parts := rows.split(len(rows) // 2)):
            with engine.accumulate(pruner.model, last=number == len(parts) - 1):
                loss = engine.forward(pruner.model)(input_ids=part, labels=part, use_cache=False).loss / len(parts)
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(engine.mean(total)))
    pruner.close()
    plain = engine.gather(pruner.model)
    weights = {key: param.detach().clone() for key, param in plain.named_parameters()} if engine.is_main else {}
    return {
        "removals": [(removal.kind, removal.units) for removal in pruner.removals],
        "losses": losses,
        "shape": pruner.shape,
        "weights": weights,
    }


def main(out: Path, engines: list[str], names: list[str]) -> None:
    torch.set_num_threads(1)
    results = {}
    DDP(torch.device("cpu"))  # the ranks meet
    for name in names:
        for compensate in (False, True):
            alone = train(Engine(torch.device("cpu")), name, compensate)
            for kind in engines:
                engine = make_engine(kind)
                found = train(engine, name, compensate)
                if engine.is_main:
                    results[f"{kind} {name} {'B' if compensate else 'A'}"] = compare(alone, found)
                    out.write_text(json.dumps(results, indent=1))
    results["disagreement"] = {"error": disagreement(engine)}
    if engine.is_main:
        out.write_text(json.dumps(results, indent=1))
    engine.close()


def disagreement(engine: Engine) -> str:
    """Returns what is said when a rank has other scores than the rest: the negative control of what is compared."""
    removal = Removal(3, "ffn", {"layers.0.ffn": engine.rank}, {}, 10, 9)
    try:
        engine.check_same([removal])
    except TrainingError as error:
        return str(error)
    return "nothing"


def make_engine(kind: str) -> Engine:
    device = torch.device("cpu")
    return DDP(device) if kind == "ddp" else FSDP(device, shards=2 if kind == "hsdp" else dist.get_world_size())


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
