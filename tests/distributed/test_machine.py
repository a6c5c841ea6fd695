"""What a run makes of its machine: memory that runs out, compiled graphs, precision, steps that do not wait."""

import copy
import json
import os
import re
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from efficientllm.config.run_config import RunConfig
from efficientllm.distributed.device import default_precision, default_threads
from efficientllm.distributed.engine import Engine
from efficientllm.distributed.host import physical_cores
from efficientllm.errors import TrainingError
from efficientllm.models.load import empty_model, load_model
from efficientllm.pruning import LinearPace, Pruner
from efficientllm.pruning.norms import LiveNorms
from efficientllm.space import find_limits, find_space
from efficientllm.training.cross_entropy import cross_entropy_and_grad_
from efficientllm.training.loss import chunked_loss_
from efficientllm.training.recipe import make_recipe
from efficientllm.training.recompute import checkpoint_
from efficientllm.training.trainer import Trainer
from helpers.families import NAMES, batch, make_model
from helpers.paths import DEMO_MODEL
from helpers.waits import Waits

CPU = torch.device("cpu")


# --- memory ----------------------------------------------------------------------------------------------------------

LIMITED = """
    import os, resource, sys
    import efficientllm.run.prune
    from efficientllm.cli import main
    from transformers import AutoModelForCausalLM
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    if os.environ.get("RANK", "1") == "1":
        resource.setrlimit(resource.RLIMIT_AS, (used + int(float(sys.argv[1]) * 1e9),) * 2)
    sys.exit(main(sys.argv[2:]))
"""


def limited(
    gigabytes: float, tmp_path: Path, out: Path, launch: tuple[str, ...] = (), **flags: str
) -> "subprocess.CompletedProcess[str]":
    """A short run in a process, or one of two, that may take so much memory more than it has after its imports."""
    data = tmp_path / "text.jsonl"
    texts = [f"def area_{n}(a, b):\n    return a * {n} + b ** {n % 7}\n" * 12 for n in range(600)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["prune", str(DEMO_MODEL), "--data", str(data), "--target-params", "560000", "--prune-tokens", "32768"]
    words += ["--tokens", "65536", "--seq-len", "128", "--batch-tokens", "32768", "--out", str(out)]
    words += [word for flag, value in flags.items() for word in ("--" + flag.replace("_", "-"), value)]
    script = tmp_path / "limited.py"
    script.write_text(textwrap.dedent(LIMITED))
    command = [sys.executable, *launch, str(script), str(gigabytes), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, check=False)


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(tmp_path: Path) -> None:
    """Oracle: the run that was given the smaller micro-batch; both do the same sums in the same order."""
    done = limited(1.5, tmp_path, tmp_path / "halved", micro_batch_size="256")
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = re.findall(r"out of memory with \d+ rows? of 128 tokens per pass; continuing with (\d+)", done.stdout)
    assert sizes
    plain = limited(20, tmp_path, tmp_path / "given", micro_batch_size=sizes[-1])
    assert plain.returncode == 0 and "out of memory" not in plain.stdout
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("halved", "given")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_tells_it(tmp_path: Path) -> None:
    """The second of two, whose reason the first does not have."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = limited(0.6, tmp_path, tmp_path / "run", launch, micro_batch_size="128")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "efficientllm: error: rank 1 is out of memory" in line]
    assert "continue with --micro-batch-size 64" in line and "--resume" in line


def test_a_row_that_does_not_fit_is_told() -> None:
    trainer = make_trainer(micro_batch_size=3)  # of 8 rows: 1 divides both
    with pytest.raises(
        TrainingError, match="out of memory with 1 row of 32 tokens per pass; use --activation-checkpointing full or"
    ):
        trainer._halve(8)
    with pytest.raises(TrainingError, match="or remove --distill"):
        make_trainer(micro_batch_size=3, distill="source")._halve(8)


# --- compiled graphs -------------------------------------------------------------------------------------------------


def pruned(
    engine: Engine, name: str, compensate: bool, how: str = "none", steps: int = 12
) -> tuple[list[float], list[Any], list[Any]]:
    """Losses, removals and the physical shape of every step of a short run."""
    model = make_model(name, dtype=torch.float32)
    space = find_space(model)
    checkpoint_(model, how)
    chunked_loss_(model, engine.compiled(cross_entropy_and_grad_))
    model = engine.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    pruner = Pruner(
        model,
        optimizer,
        int(0.6 * space.num_params(space.shape)),
        pace=LinearPace(8, 2),
        limits=find_limits(space, model.config, min_ffn=16, min_hidden=12),
        compensate=compensate,
        compaction_tile=8,
        placement=engine,
    )
    losses, shapes = [], []
    for step in range(steps):
        shapes.append(tuple(pruner.space.shape.values()))
        tokens = batch(step, rows=3)
        with engine.autocast():
            loss = engine.forward(model)(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [(removal.kind, removal.units) for removal in pruner.removals], shapes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compensate", "how"),
    [
        ("llama-tied", False, "none"),
        ("qwen2", True, "none"),
        ("qwen2", True, "selective"),
        ("qwen2", True, "full"),
    ],
)
def test_compiled_it_prunes_as_it_does_without_and_compiles_at_compactions_alone(
    name: str, compensate: bool, how: str
) -> None:
    plain, compiled = Engine(CPU), Engine(CPU, compiles=True)
    losses, removals, _ = pruned(plain, name, compensate)
    found, same, shapes = pruned(compiled, name, compensate, how)
    assert same == removals and len(removals) > 10
    assert found == pytest.approx(losses, rel=1e-4)
    changes = 1 + sum(before != after for before, after in pairwise(shapes))
    assert changes > 2 and plain.compilations == 0
    assert compiled.compilations == 2 * changes  # a layer's graph, which all layers share, and the loss's


@pytest.mark.slow
def test_compiled_in_bf16_a_layer_is_one_graph_too() -> None:
    engine = Engine(CPU, "bf16", compiles=True)
    found, removals, shapes = pruned(engine, "qwen2", True)
    plain, _, _ = pruned(Engine(CPU, "bf16"), "qwen2", True)
    assert found == pytest.approx(plain, rel=1e-2) and len(removals) > 10
    assert engine.compilations == 2 * (1 + sum(before != after for before, after in pairwise(shapes)))


# --- waiting for the device ------------------------------------------------------------------------------------------


def make_trainer(**changes: Any) -> Trainer:
    model = load_model(str(DEMO_MODEL), dtype=torch.float32)
    space = find_space(empty_model(model.config, "demo"))
    limits = find_limits(space, model.config)
    values = {"target_params": 560_000, "prune_tokens": 8 * 256, "tokens": 16 * 256, "micro_batch_size": 2, **changes}
    config = RunConfig(seq_len=32, batch_tokens=256, **values)
    teacher = load_model(str(DEMO_MODEL), dtype=torch.float32) if config.distill else None
    recipe = make_recipe(config, space, limits)
    trainer = Trainer(model, config, recipe, limits, Engine(CPU), lambda size: None, teacher=teacher)
    generator = torch.Generator().manual_seed(0)
    trainer.batches = iter(lambda: torch.randint(0, 500, (8, 32), generator=generator), None)
    return trainer


@pytest.mark.parametrize("settings", [{}, {"distill": "source", "distill_hidden": 0.5}, {"score_ema": 0.9}])
def test_a_step_without_removal_never_waits_for_the_device(settings: dict[str, Any]) -> None:
    trainer = make_trainer(**settings)
    waits, removals = [], []
    for _ in range(16):
        before = len(trainer.pruner.removals)
        with Waits() as mode:
            trainer.train_step()
        waits.append(mode.count)
        removals.append(len(trainer.pruner.removals) - before)
    assert sum(removals) > 10 and removals.count(0) >= 8
    assert all(count == 0 for count, removed in zip(waits, removals, strict=True) if not removed)
    assert any(waits)  # the negative control: choosing units needs their scores
    assert [row["step"] for row in trainer.metrics.settle()] == list(range(1, 17)) and trainer.metrics.settle() == []


def test_a_step_that_is_not_finite_leaves_everything_as_it_was() -> None:
    trainer = make_trainer(target_params=602_976)
    for _ in range(3):
        trainer.train_step()
    trainer.metrics.settle()
    with torch.no_grad():
        broken = next(iter(trainer.model.parameters()))
        kept = broken[0, 0].clone()
        broken[0, 0] = torch.inf
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    trainer.batches = iter(lambda: torch.zeros(8, 32, dtype=torch.long), None)  # token 0 reads the broken entry
    trainer.train_step()
    (row,) = trainer.metrics.settle()
    assert row["loss"] is None and row["skipped"] == 1 and row["step"] == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.tensors().items())
    with torch.no_grad():
        broken[0, 0] = kept
    trainer.train_step()
    (row,) = trainer.metrics.settle()
    assert row["loss"] is not None and not torch.equal(
        trainer.tensors()["model.norm.weight"], before["model.norm.weight"]
    )


# --- processor -------------------------------------------------------------------------------------------------------


def test_threads_are_the_physical_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said = subprocess.run(["lscpu", "-p=SOCKET,CORE,CPU"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(",") for line in said.splitlines() if not line.startswith("#")]
    allowed = os.sched_getaffinity(0)
    assert physical_cores() == len({tuple(row[:2]) for row in rows if int(row[2]) in allowed})
    assert default_threads() == physical_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert default_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 3


def test_bf16_needs_instructions_and_a_model_that_gains_from_them() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    has = "avx512_bf16" in flags or "amx_bf16" in flags
    assert default_precision(CPU, 135_000_000) == ("bf16" if has else "float32")
    assert default_precision(CPU, 600_000) == "float32"


def test_bf16_products_leave_weights_and_moments_in_float32() -> None:
    engine = Engine(CPU, "bf16")
    model = engine.wrap(make_model("llama-tied", dtype=torch.bfloat16))
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with engine.autocast():
        loss = model(input_ids=batch(), labels=batch()).loss
    loss.backward()
    optimizer.step()
    assert seen == [torch.bfloat16]
    tensors = [*model.parameters(), *(param.grad for param in model.parameters())]
    tensors += [state["exp_avg"] for state in optimizer.state.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def dtypes_between(model: Any, engine: Engine) -> set[torch.dtype]:
    """What comes into the layers, and into every product of theirs."""
    seen = set()
    for layer in model.model.layers:
        for module in [layer, *(each for each in layer.modules() if isinstance(each, torch.nn.Linear))]:
            module.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    with engine.autocast():
        assert model(input_ids=batch(), labels=batch(), use_cache=False).loss.isfinite()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_what_runs_between_the_products_is_bf16(name: str) -> None:
    engine = Engine(CPU, "bf16")
    plain = make_model(name, dtype=torch.float32)
    wrapped = engine.wrap(copy.deepcopy(plain))
    with torch.no_grad():
        assert torch.equal(wrapped(input_ids=batch()).logits, plain(input_ids=batch()).logits)  # without autocast
    assert dtypes_between(wrapped, engine) == {torch.bfloat16}
    assert torch.float32 in dtypes_between(plain, engine)  # control: autocast alone


def test_in_bf16_a_norm_over_retired_units_is_rounded_once() -> None:
    engine, generator = Engine(CPU, "bf16"), torch.Generator().manual_seed(0)
    norm = engine.wrap(make_model("llama", dtype=torch.float32)).model.norm
    x = torch.randn(50, 24, generator=generator)
    x[:, 14:] = 0
    LiveNorms().set(norm, 14, 24)
    exact = norm(x)
    with engine.autocast():
        assert torch.equal(norm(x), exact.bfloat16())
    assert exact.dtype == torch.float32
