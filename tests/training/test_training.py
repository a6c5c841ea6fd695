"""The parts of a run, each by itself: recipe, Fisher, validation, warnings, logs, checkpoints."""

import json
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from efficientllm.config.run_config import RunConfig
from efficientllm.distributed.checkpoint import SHARDS, Checkpoints, last_checkpoint
from efficientllm.distributed.engine import Engine
from efficientllm.errors import CheckpointError, ConfigError
from efficientllm.pruning import LinearPace, Removal, SlotPace
from efficientllm.run.logs import JsonLines, read_rows
from efficientllm.space import find_limits, find_space
from efficientllm.training.failure_signs import FailureSigns
from efficientllm.training.fisher import Fisher
from efficientllm.training.recipe import default_lr, make_recipe
from efficientllm.training.validation import validation_loss


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return LlamaForCausalLM(config)


def recipe(**values: object) -> object:
    model = tiny()
    space = find_space(model)
    limits = find_limits(space, model.config)
    base = {"batch_tokens": 100, "seq_len": 10, "target_params": space.num_params(limits.source) * 3 // 4}
    return make_recipe(RunConfig(**{**base, **values}), space, limits)  # type: ignore[arg-type]


def test_token_counts_round_up_to_batches() -> None:
    made = recipe(prune_tokens=1501, tokens=3001)
    assert (made.prune_steps, made.total_steps, made.batch_rows) == (16, 31, 10)  # type: ignore[attr-defined]
    assert made.pace == LinearPace(16, 1)  # type: ignore[attr-defined]  # 7% of 16


def test_warm_up_is_at_most_500_steps() -> None:
    made = recipe(prune_tokens=10_000_000, tokens=20_000_000)
    assert made.warmup_steps == 500 and made.decay_steps == 60_000  # type: ignore[attr-defined]
    assert not made.remarks  # type: ignore[attr-defined]


def test_pruning_into_the_decay_is_remarked() -> None:
    assert "decay" in recipe(prune_tokens=9000, tokens=10_000).remarks[0]  # type: ignore[attr-defined]


def test_removals_per_step_is_an_equal_slot() -> None:
    made = recipe(removals_per_step=4.0, tokens=10_000)
    assert isinstance(made.pace, SlotPace) and made.pace.slot_steps == 0.25 and made.pace.equal  # type: ignore[attr-defined]


def test_slots_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="prune faster"):
        recipe(slot_steps=50.0, tokens=1000)


@pytest.mark.parametrize(
    ("params", "lr"), [(260_032, 3e-3), (1_000_000, 1e-3), (134_000_000, 5e-4), (500_000_000, 3e-4), (7 * 10**9, 3e-4)]
)
def test_learning_rate_follows_the_size(params: int, lr: float) -> None:
    assert default_lr(params)[0] == lr


def test_fisher_is_the_mean_of_squared_micro_batch_gradients() -> None:
    model = tiny()
    batches = torch.randint(0, 48, (3, 2, 12))
    expected: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    for batch in batches:
        gradients = torch.autograd.grad(model(input_ids=batch, labels=batch).loss, list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            expected[name] = expected.get(name, torch.zeros_like(gradient)) + gradient.square() / 3
            whole[name] = whole.get(name, torch.zeros_like(gradient)) + gradient / 3
    fisher = Fisher(model, 3)
    for batch in batches:
        (model(input_ids=batch, labels=batch).loss / 3).backward()
        fisher.add()
    found = fisher.finish()
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name], expected[name])
        torch.testing.assert_close(param.grad, whole[name])
    assert not all(torch.allclose(found[name], whole[name].square()) for name in found)  # the step's own square differs


def test_validation_loss_is_the_mean_over_tokens_and_leaves_the_mode() -> None:
    model = tiny().train()
    rows = [np.random.default_rng(n).integers(0, 48, 12) for n in range(5)]
    whole = torch.tensor(np.stack(rows))
    with torch.no_grad():
        logits = model.eval()(input_ids=whole).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, whole[:, 1:].flatten())
    model.train()
    assert validation_loss(model, rows, 2, Engine(torch.device("cpu"))) == pytest.approx(float(expected), rel=1e-6)
    assert model.training


def removal(kind: str, before: int, after: int) -> Removal:
    return Removal(1, kind, {}, {}, before, after)


def watch(total: int = 1000) -> FailureSigns:
    model = tiny()
    return FailureSigns(find_limits(find_space(model), model.config, min_ffn=40), total)


def test_a_jump_after_a_removal_is_told_once() -> None:
    noise = [2.0 + 0.01 * (n % 3) for n in range(30)]
    quiet, loud = watch(), watch()
    for loss in noise:
        assert not quiet.observe(loss, 1.0, True) and not loud.observe(loss, 1.0, True)
    assert not quiet.observe(2.5, 1.0, False)  # no removal before it
    assert "--prune-tokens" in loud.observe(2.5, 1.0, True)[0]
    assert not loud.observe(3.5, 1.0, True)


def test_an_exploding_gradient_is_told() -> None:
    seen = watch()
    for _ in range(30):
        assert not seen.observe(2.0, 1.0, False)
    assert "--lr" in seen.observe(2.0, 100.0, False)[0]


def test_a_floor_and_one_sided_removal_are_told() -> None:
    seen = watch()
    shape = {"hidden": 40, "ffn": 50, "kv": 2, "query": 2}
    assert not seen.observe_removals([removal("ffn", 1000, 600)], shape)  # too early to say
    assert "100%" in seen.observe_removals([removal("ffn", 600, 400)], shape)[0]
    mixed = watch()
    assert not mixed.observe_removals([removal("ffn", 1000, 800), removal("hidden", 800, 600)], shape)
    assert "floor of 40" in mixed.observe_removals([removal("ffn", 600, 500)], {**shape, "ffn": 40})[0]


def test_watch_goes_on_from_its_state() -> None:
    one, other = watch(), watch()
    for n in range(30):
        one.observe(2.0 + 0.01 * (n % 3), 1.0, True)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.observe(9.0, 1.0, True) == other.observe(9.0, 1.0, True) != []


def test_logs_are_cut_back_to_a_step(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    for step in range(4):
        log.append({"step": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    log.cut_back(2)
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [0, 1, 2]
    log.append({"step": 3, "again": True})
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [0, 1, 2, 3]


def save_steps(folder: Path, steps: range, keep_before: int) -> None:
    model, checkpoints = tiny(), Checkpoints(folder, keep_before)
    for step in steps:
        random = {"random.cpu": torch.get_rng_state()}
        checkpoints.save(dict(model.named_parameters()), {"step": step}, random, model.config)
    checkpoints.finish()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """What is saved is what stood there when `save` was called, however long the writing takes."""
    big = {"a": torch.randn(3_000_000), "exp_avg:a": torch.randn(5, 7).T}
    expected = {name: tensor.clone() for name, tensor in big.items()}
    checkpoints = Checkpoints(tmp_path, 0)
    checkpoints.save(big, {"step": 1}, {}, tiny().config)
    begun = not (tmp_path / "step-00000001").exists()  # it is still being written
    for tensor in big.values():
        tensor.zero_()
    checkpoints.finish()
    found = last_checkpoint(tmp_path)
    assert begun and found is not None
    loaded = {name: torch.ones_like(tensor) for name, tensor in big.items()}
    found.load_(loaded)
    assert all(torch.equal(loaded[name], expected[name]) for name in big)


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 0)
    checkpoints.save({"a": torch.randn(3_000_000)}, {"step": 1}, {}, tiny().config)
    checkpoints.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # a full disk, for files of this process
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        checkpoints.save({"a": torch.randn(3_000_000)}, {"step": 2}, {}, tiny().config)
        with pytest.raises(OSError, match="too large"):
            checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_checkpoints_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 8), keep_before=3)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000006", "step-00000007"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    save_steps(tmp_path, range(1, 3), keep_before=0)
    file = tmp_path / "step-00000002" / ("manifest.json" if damage == "manifest" else SHARDS)
    if file.is_dir():
        (file,) = file.iterdir()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-7])
    said: list[str] = []
    found = last_checkpoint(tmp_path, report=said.append)
    assert found is not None and found.step == 1
    assert "step-00000002" in said[0]


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    save_steps(tmp_path, range(1, 3), keep_before=0)
    for path in tmp_path.iterdir():
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(2 in all\)"):
        last_checkpoint(tmp_path)


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 2), keep_before=0)
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.partial")
    assert last_checkpoint(tmp_path) is None
