"""Learning from a teacher: the loss against torch's own KL, its memory, and runs that are and are not taught."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from efficientllm.cli import main
from efficientllm.config.run_config import RunConfig
from efficientllm.distributed.engine import Engine
from efficientllm.space import find_limits, find_space
from efficientllm.training.cross_entropy import next_token_loss
from efficientllm.training.distillation import DistillationTargets, Kept, distillation_loss_and_grad_, state_distance
from efficientllm.training.loss import chunked_loss_
from efficientllm.training.recipe import make_recipe
from efficientllm.training.teacher import Teacher
from efficientllm.training.trainer import Trainer
from helpers.families import NAMES, batch, capped, make_model
from helpers.paths import DEMO_MODEL

CPU = torch.device("cpu")


# --- the loss --------------------------------------------------------------------------------------------------------


def written_out(student: Any, teacher: Any, tokens: Tensor, weight: float, temperature: float) -> Tensor:
    """The loss from stock models' logits, by torch's cross_entropy and kl_div under autograd."""
    z = student(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        t = teacher(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    ce = F.cross_entropy(z, tokens[:, 1:].flatten())
    log_q, log_p = (F.log_softmax(each / temperature, -1) for each in (z, t))
    return (1 - weight) * ce + weight * temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [*NAMES])
def test_every_family_has_the_loss_and_gradients_of_torch(name: str) -> None:
    """Also Granite's scaled and Gemma's soft-capped logits, of the student and of another model of the family."""
    stock, ours, teacher = (make_model(name, seed=seed, **capped(name)) for seed in (0, 0, 1))
    chunked_loss_(ours)
    tokens = batch(rows=3)
    expected = written_out(stock, teacher, tokens, 0.3, 2.0)
    targets = Teacher(teacher, RunConfig(distill_weight=0.3, distill_temperature=2.0), Engine(CPU)).targets(tokens)
    loss, (ce, kl) = ours(input_ids=tokens, labels=tokens, targets=replace(targets, rows=7), use_cache=False)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert loss.item() == pytest.approx(0.7 * ce.item() + 0.3 * 4 * kl.item(), abs=1e-12)
    expected.backward(), loss.backward()
    for (key, mine), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=1e-9, msg=key)
    assert all(param.grad is None for param in teacher.parameters())


def leaves(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h, W = (torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in (20, 11))
    return h.requires_grad_(), W.requires_grad_(), torch.randint(0, 11, (20,), generator=generator)


def targets_of(states: Tensor, head: Tensor, weight: float, **more: Any) -> DistillationTargets:
    return DistillationTargets(
        states.detach(),
        head.detach(),
        1.0,
        None,
        weight,
        more.pop("temperature", 1.0),
        distillation_loss_and_grad_,
        **more,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
def test_what_the_teacher_does_as_well_needs_no_learning(temperature: float) -> None:
    h, W, targets = leaves()
    taught = targets_of(h, W, 1.0, temperature=temperature)
    loss, (_, kl) = taught.loss(h, W, targets, scale=1.0, cap=None)
    loss.backward()
    assert loss.item() == kl.item() == 0 and not h.grad.any() and not W.grad.any()
    other, _, _ = leaves(1)  # the negative control
    loss, (_, kl) = taught.loss(other, W, targets, scale=1.0, cap=None)
    loss.backward()
    assert kl.item() > 0.1 and other.grad.abs().max() > 1e-3


@pytest.mark.parametrize("cap", [None, 2.0])
def test_without_weight_it_is_the_loss_without_a_teacher_bitwise(cap: float | None) -> None:
    h, W, targets = leaves()
    states, head, _ = leaves(1)
    loss, _ = targets_of(states, head, 0.0, rows=7).loss(h, W, targets, scale=0.7, cap=cap)
    loss.backward()
    found, h.grad, W.grad = (h.grad, W.grad), None, None
    plain = next_token_loss(h, W, targets, scale=0.7, cap=cap, rows=7)
    plain.backward()
    assert torch.equal(loss, plain) and torch.equal(found[0], h.grad) and torch.equal(found[1], W.grad)


def test_states_compare_on_the_dimensions_that_are_left() -> None:
    h, _, _ = leaves()
    theirs = torch.randn(20, 9, dtype=torch.float64)
    index, live = torch.tensor([1, 2, 4, 5, 7, 8]), torch.tensor([True, True, False, True, True, False])
    there = h.detach() * live  # retired dimensions are zero in the student
    there.requires_grad_()
    distance = state_distance(there, theirs, Kept(index, live))
    kept = index[live]
    expected = 1 - F.cosine_similarity(there[:, live], theirs[:, kept], dim=1).mean()
    assert distance.item() == pytest.approx(expected.item(), abs=1e-12)
    # compacted, it is the same; and a teacher that says the same at another length is no distance away
    gone = state_distance(there[:, live], theirs, Kept(kept, torch.ones(4, dtype=torch.bool)))
    assert gone.item() == pytest.approx(distance.item(), abs=1e-12)
    same = torch.zeros(20, 9, dtype=torch.float64).index_copy(1, index, 3 * there.detach())
    assert state_distance(there, same, Kept(index, live)).item() < 1e-15
    assert torch.autograd.gradcheck(lambda x: state_distance(x, theirs, Kept(index, live)), there)


def test_neither_model_has_its_logits_whole() -> None:
    """In a process of its own: 1,024 tokens of a vocabulary of 128k are 0.5 GB of logits of each model."""
    script = """
        import resource, torch
        from efficientllm.training.distillation import DistillationTargets, distillation_loss_and_grad_
        h, W = torch.randn(1024, 16, requires_grad=True), torch.randn(131072, 16, requires_grad=True)
        states, head = torch.randn(1024, 24), torch.randn(131072, 24)
        targets = torch.randint(0, 131072, (1024,))
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = peak()
        taught = DistillationTargets(states, head, 1.0, None, 0.5, 2.0, distillation_loss_and_grad_)
        taught.loss(h, W, targets, scale=1.0, cap=None)[0].backward()
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=200
    )
    assert float(done.stdout) < 450  # MiB; the loss of tokens alone stays below 400, whole logits take over 2,000


# --- the trainer -----------------------------------------------------------------------------------------------------


def make_trainer(engine: Engine, steps: int = 8, dtype: torch.dtype = torch.float32, **more: Any) -> Trainer:
    """A tiny Qwen2 that is taught by itself and loses units of every kind."""
    source = make_model("qwen2", dtype=dtype)
    space = find_space(source)
    limits = find_limits(space, source.config, min_ffn=24, min_hidden=12)
    config = RunConfig(
        seq_len=12,
        batch_tokens=96,
        target_params=int(1.02 * space.num_params({**limits.floor, "query": 1})),
        prune_tokens=96 * steps,
        tokens=96 * steps,
        lr=3e-3,
        **{"micro_batch_size": 4, "distill": "source", **more},
    )
    teacher = make_model("qwen2", dtype=dtype) if config.distill else None
    recipe = make_recipe(config, space, limits)
    trainer = Trainer(source, config, recipe, limits, engine, lambda size: None, teacher=teacher)
    trainer.batches = iter([batch(step, rows=8) for step in range(steps)])
    return trainer


def rows_of(trainer: Trainer) -> Iterator[dict[str, Any]]:
    while not trainer.done:
        trainer.train_step()
    yield from trainer.metrics.settle()


def test_parts_of_the_loss_are_logged_and_add_up() -> None:
    trainer = make_trainer(Engine(CPU), distill_weight=0.25, distill_temperature=2.0, distill_hidden=0.5)
    assert trainer.teacher is not None
    before = {name: param.clone() for name, param in trainer.teacher.model.named_parameters()}
    first, *rows = rows_of(trainer)
    # the student is the teacher still
    assert abs(first["kl"]) < 1e-6 and first["hidden_distance"] < 1e-12 and first["ce"] > 3
    for row in rows:
        parts = 0.75 * row["ce"] + 0.25 * 4 * row["kl"] + 0.5 * row["hidden_distance"]
        assert row["loss"] == pytest.approx(parts, rel=1e-6) and row["kl"] > 0 and row["hidden_distance"] > 0
    assert len(trainer.pruner.removals) > 25
    assert {removal.kind for removal in trainer.pruner.removals} == {"hidden", "ffn", "kv", "query"}
    assert all(torch.equal(param, before[name]) for name, param in trainer.teacher.model.named_parameters())


def test_hidden_dimensions_keep_their_partners_while_they_wait_and_after() -> None:
    """Compacted at once or in tiles it is the same run; the tracker names the teacher's dimensions in both."""
    results = []
    for tile in (None, 8):
        engine = Engine(CPU)
        engine.compaction_tile = tile
        trainer = make_trainer(engine, 30, torch.float64, distill_hidden=2.0)
        rows = list(rows_of(trainer))
        results.append(([row["loss"] for row in rows], [removal.units for removal in trainer.pruner.removals]))
    assert results[0][1] == results[1][1]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    plain = [row["loss"] for row in rows_of(make_trainer(Engine(CPU), 30, torch.float64))]
    assert plain != pytest.approx(results[0][0], rel=1e-3)  # the term counts


def test_in_bf16_it_is_as_near_as_bf16_is() -> None:
    exact = [row["loss"] for row in rows_of(make_trainer(Engine(CPU)))]
    trainer = make_trainer(Engine(CPU, "bf16"))
    assert trainer.teacher is not None
    assert {param.dtype for param in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert all(buffer.dtype == torch.float32 for buffer in trainer.teacher.model.buffers())  # of the rotation
    found = [row["loss"] for row in rows_of(trainer)]
    assert found == pytest.approx(exact, rel=3e-2) and found != exact


@pytest.mark.slow
def test_compiled_it_learns_as_it_does_without() -> None:
    plain = [row["loss"] for row in rows_of(make_trainer(Engine(CPU)))]
    engine = Engine(CPU, compiles=True)
    found = [row["loss"] for row in rows_of(make_trainer(engine))]
    assert found == pytest.approx(plain, rel=1e-4) and engine.compilations > 2


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    texts = [f"Return item {n} of the list {'and the next ' * (n % 7)}or raise IndexError. " * 6 for n in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def words_of(data: Path, out: Path, *more: str) -> list[str]:
    words = ["prune", str(DEMO_MODEL), "--data", str(data), "--target-params", "590000", "--prune-tokens", "2560"]
    words += ["--tokens", "4096", "--seq-len", "64", "--batch-tokens", "512", "--valid-tokens", "1024", "--lr", "1e-3"]
    return [*words, "--checkpoint-every", "3", "--out", str(out), *more]


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_in(out: Path) -> bytes:
    return (out / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def taught(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "taught"
    assert main(words_of(data, out, "--distill", "--distill-hidden", "0.1")) == 0
    return out


def test_a_taught_run_goes_on_with_the_same_bytes(taught: Path, tmp_path: Path) -> None:
    """From its checkpoint at step 6 of 8, as if it had been killed at the last step."""
    out = tmp_path / "copy"
    shutil.copytree(taught, out)
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 6:
            shutil.rmtree(path)
    assert main(["prune", "--resume", "--out", str(out)]) == 0
    assert weights_in(out) == weights_in(taught)
    speed = {"tokens_per_second": None, "memory_bytes": None}
    assert [row | speed for row in rows_in(out)] == [row | speed for row in rows_in(taught)]


def test_a_teacher_without_weight_changes_nothing_and_the_source_by_name_is_the_source(
    data: Path, taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, flags in {"plain": [], "weightless": ["--distill", "--distill-weight", "0"]}.items():
        assert main(words_of(data, tmp_path / name, *flags)) == 0
    assert weights_in(tmp_path / "plain") == weights_in(tmp_path / "weightless")
    assert weights_in(tmp_path / "plain") != weights_in(taught)
    plain, weightless = (rows_in(tmp_path / name)[-1] for name in ("plain", "weightless"))
    assert plain["loss"] == weightless["loss"] == weightless["ce"] and weightless["kl"] > 0 and "kl" not in plain
    assert plain["valid_loss"] == weightless["valid_loss"]
    capsys.readouterr()
    named = words_of(data, tmp_path / "named", "--distill", str(DEMO_MODEL), "--distill-hidden", "0.1")
    assert main(named) == 0
    assert weights_in(tmp_path / "named") == weights_in(taught)
    assert "602,976 parameters, frozen; loss = 0.5 CE + 0.5 KL at temperature 1 + 0.1 distance" in (
        capsys.readouterr().out
    )


def edited(tmp_path: Path, **changes: Any) -> Path:
    """A copy of the source whose config or vocabulary is another."""
    folder = tmp_path / "other"
    shutil.copytree(DEMO_MODEL, folder)
    if swap := changes.pop("swap", None):
        described = json.loads((folder / "tokenizer.json").read_text())
        vocab = described["model"]["vocab"]
        first, second = swap
        vocab[first], vocab[second] = vocab[second], vocab[first]
        (folder / "tokenizer.json").write_text(json.dumps(described))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"vocab_size": 2050}, [], ["vocabulary has 2,050", "own tokenizer"]),
        ({"swap": ("a", "b")}, [], ["its tokenizer is not that of", "there and", "own tokenizer"]),
        ({"max_position_embeddings": 32}, [], ["max_position_embeddings 32", "--seq-len 64"]),
        ({"hidden_size": 48}, ["--distill-hidden", "1"], ["--distill-hidden", "has 48 where", "has 96"]),
        ({"model_type": "gpt2"}, [], ["gpt2"]),
        (None, ["--distill-weight", "1.5"], ["--distill-weight 1.5 is not between 0 and 1"]),
        (None, ["--distill-temperature", "0"], ["--distill-temperature 0.0 is not above 0"]),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_and_nothing_written(
    changes: dict[str, Any] | None,
    flags: list[str],
    words: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = str(edited(tmp_path, **changes)) if changes else "source"
    assert main(words_of(data, tmp_path / "out", "--distill", teacher, *flags)) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_flags_of_a_teacher_need_one(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words_of(data, tmp_path / "out", "--distill-hidden", "1")) == 2
    assert "--distill-hidden 1.0 is used only with --distill" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--distill-weight", "0.3"], ["--distill", "elsewhere"]])
def test_a_run_keeps_its_teacher(flags: list[str], taught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = weights_in(taught)
    assert main(["prune", "--resume", "--out", str(taught), *flags]) == 2
    assert f"--resume with {flags[0]}" in capsys.readouterr().err and weights_in(taught) == before
