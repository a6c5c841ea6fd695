"""The second-order update against torch.linalg.lstsq, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from efficientllm.errors import TrainingError
from efficientllm.pruning import Pruner, SlotPace, activations
from efficientllm.pruning.activations import InputSampler, compensate_, consumer_inputs
from efficientllm.pruning.compensation import DAMP, damped_, gram, solve, solve_by_rows, update
from efficientllm.pruning.removal import retire_
from efficientllm.space import find_space
from helpers.families import batch, logits, loss_of, make_model
from helpers.waits import Waits


def layer(rows: int = 200, width: int = 12, out: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns W and correlated inputs X."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    X = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(out, width, generator=generator, dtype=torch.float64), X


def damped_gram(X: Tensor) -> Tensor:
    return damped_(gram(X))


def absorb(W: Tensor, H: Tensor, removed: Tensor) -> Tensor:
    return update(W, solve(H, removed), removed)


def least_squares(W: Tensor, X: Tensor, removed: list[int], damp: float = DAMP) -> Tensor:
    """The kept columns that bring the outputs nearest, damping rows pulling to the old weights."""
    width = X.shape[1]
    ridge = (damp * (X**2).sum(0).mean()).sqrt() * torch.eye(width, dtype=X.dtype)
    rows = torch.cat([X, ridge])  # rows.T @ rows = H
    kept = [i for i in range(width) if i not in removed]
    solution = torch.linalg.lstsq(rows[:, kept], rows @ W.T).solution.T
    result = torch.zeros_like(W)
    result[:, kept] = solution
    return result


@pytest.mark.parametrize("removed", [[3], [0, 11], [5, 2, 8, 9]])
@pytest.mark.parametrize("rows", [200, 5])  # five rows leave H singular without its damping
def test_update_is_damped_least_squares(removed: list[int], rows: int) -> None:
    W, X = layer(rows)
    updated = absorb(W, damped_gram(X), torch.tensor(removed))
    torch.testing.assert_close(updated, least_squares(W, X, removed), rtol=1e-9, atol=1e-10)
    assert not updated[:, removed].any()
    by_rows = update(W, solve_by_rows(X, torch.tensor(removed)), torch.tensor(removed))
    torch.testing.assert_close(by_rows, updated, rtol=1e-9, atol=1e-10)
    rows = [update(part, solve(damped_gram(X), torch.tensor(removed)), torch.tensor(removed)) for part in W.split(3)]
    torch.testing.assert_close(torch.cat(rows), updated, rtol=1e-12, atol=1e-12)  # a rank holds some rows alone
    halves = gram(X[: len(X) // 2]) + gram(X[len(X) // 2 :])  # or some of the inputs
    torch.testing.assert_close(damped_(halves), damped_gram(X), rtol=1e-12, atol=1e-12)
    K = [i for i in range(12) if i not in removed]
    H = damped_gram(X)
    formula = W[:, K] + W[:, removed] @ H[removed][:, K] @ torch.linalg.inv(H[K][:, K])
    torch.testing.assert_close(updated[:, K], formula, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("removed", [[3], [5, 2, 8, 9]])
def test_what_is_left_of_the_error(removed: list[int]) -> None:
    """tr(W_P ([H⁻¹]_PP)⁻¹ W_Pᵀ), and plain zeroing leaves more."""
    W, X = layer()
    H, P = damped_gram(X), torch.tensor(removed)
    updated = absorb(W, H, P)

    def error(other: Tensor) -> float:
        return float(((W - other) @ H @ (W - other).T).trace())

    inner = torch.linalg.inv(H)[P][:, P]
    assert error(updated) == pytest.approx(float((W[:, P] @ torch.linalg.inv(inner) @ W[:, P].T).trace()), rel=1e-9)
    zeroed = W.clone()
    zeroed[:, P] = 0
    assert error(zeroed) > 1.5 * error(updated)
    assert ((W - zeroed) @ X.T).norm() > ((W - updated) @ X.T).norm()
    for _ in range(20):  # no other weights on the kept channels do better
        other = updated + 1e-3 * torch.randn_like(updated)
        other[:, P] = 0
        assert error(other) > error(updated)


def test_dead_channels_count_nowhere() -> None:
    """Pending in-channels are zero in X: the rest is updated as if they were not there."""
    W, X = layer()
    dead, live = [1, 6], [i for i in range(12) if i not in (1, 6)]
    X[:, dead] = 0
    W[:, dead] = 0
    updated = absorb(W, damped_gram(X), torch.tensor([4]))
    assert not updated[:, dead].any()
    alone = absorb(W[:, live], damped_gram(X[:, live]), torch.tensor([live.index(4)]))
    torch.testing.assert_close(updated[:, live], alone, rtol=1e-9, atol=1e-12)
    by_rows = update(W, solve_by_rows(X, torch.tensor([4])), torch.tensor([4]))
    torch.testing.assert_close(by_rows, updated, rtol=1e-9, atol=1e-10)


def test_few_rows_are_solved_as_well_in_float32() -> None:
    """Fewer rows than in-channels, and one that outweighs the others: neither form is off by more than 1e-4."""
    W, X = layer(rows=40, width=160, out=30)
    X[:, 7] *= 100
    P = torch.tensor([7, 30])
    exact = least_squares(W, X, [7, 30])
    for Z in (solve(damped_gram(X.float()), P), solve_by_rows(X.float(), P)):
        assert (update(W.float(), Z, P) - exact).norm() < 1e-4 * exact.norm()


def test_half_precision_is_solved_in_float32() -> None:
    W, X = layer()
    updated = absorb(W.bfloat16(), damped_gram(X.bfloat16()), torch.tensor([3]))
    assert updated.dtype == torch.bfloat16 and damped_gram(X.bfloat16()).dtype == torch.float32
    exact = least_squares(W.bfloat16().double(), X.bfloat16().double(), [3])
    torch.testing.assert_close(updated.double(), exact, rtol=0.02, atol=0.02)


# --- in a model -----------------------------------------------------------------------------------------------------


def inputs_of(model: Any, names: list[str], run: Any) -> dict[str, Tensor]:
    """Records the inputs of modules, by plain hooks."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].detach().flatten(0, -2))
        )
        for name in names
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("name", ["llama", "phi3", "olmo2", "gemma2", "llama-bias"])
@pytest.mark.parametrize("kind", ["hidden", "ffn", "kv", "query"])
@pytest.mark.parametrize("rows", [1, 5])  # of 12 tokens: fewer than in-channels, and more
def test_every_consumer_is_updated_from_its_own_inputs(name: str, kind: str, rows: int) -> None:
    model = make_model(name)
    space = find_space(model)
    sampler = InputSampler(model, space)
    units = {dim.name: [row % 2] for row, dim in enumerate(space.bundles[kind].dims)}
    modules = [each for names in consumer_inputs(space).values() for each in names]
    tail = {"hidden": ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")}
    readers = [
        each for each in modules if each.endswith(tail.get(kind, ("down_proj",) if kind == "ffn" else ("o_proj",)))
    ]
    assert len(readers) >= 2

    def run() -> None:
        loss_of(model, batch(rows=rows)).backward()

    X = inputs_of(model, readers, run)
    before = {key: param.detach().clone() for key, param in model.named_parameters()}
    compensate_(model, space, units, sampler)
    group, changed = 3, set()
    for reader in readers:
        number = reader.split(".layers.")[1].split(".")[0]
        if kind == "kv":
            start = units[f"layers.{number}.kv"][0] * group * 8
            columns = list(range(start, start + group * 8))
        elif kind == "query":
            heads = [g * group + units[f"layers.{number}.query.{g}"][0] for g in range(2)]
            columns = [head * 8 + i for head in heads for i in range(8)]
        else:
            columns = units["hidden" if kind == "hidden" else f"layers.{number}.ffn"]
        key = reader + ".weight"
        expected = least_squares(before[key], X[reader], columns)
        torch.testing.assert_close(model.get_submodule(reader).weight.data, expected, rtol=1e-6, atol=1e-8)
        changed.add(key)
    for key, param in model.named_parameters():
        assert (key in changed) != torch.equal(param, before[key]), key
    sampler.close()
    assert not sampler.rows and not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["ffn", "kv"])
def test_the_outputs_stay_nearer_than_after_plain_zeroing(kind: str) -> None:
    exact = logits(make_model("llama"))
    distances = []
    for compensated in (True, False):
        model = make_model("llama")
        space = find_space(model)
        sampler = InputSampler(model, space)
        loss_of(model, batch()).backward()
        units = {dim.name: [1, 4, 7, 9] if kind == "ffn" else [1] for dim in space.bundles[kind].dims}
        if compensated:
            compensate_(model, space, units, sampler)
        retire_(model, None, space, units)
        distances.append(float((logits(model) - exact).norm()))
    assert distances[0] < 0.9 * distances[1]


def test_samples_are_capped_and_only_taken_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "ROW_CAP", 30)
    model = make_model("llama")
    sampler = InputSampler(model, find_space(model))
    logits(model)
    assert not any(sampler.rows.values()), "an evaluation was sampled"
    loss_of(model, batch(rows=5))  # 60 rows, 24 or more in-channels: at most max(30, 2 in)
    reader, wide = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert len(sampler.inputs(reader)) == 30 and sampler.inputs(reader).shape[1] == 24
    assert len(sampler.inputs(wide)) == 60
    loss_of(model, batch(rows=5))
    assert len(sampler.inputs(reader)) <= 48 and len(sampler.inputs(wide)) <= 80
    assert set(sampler.rows) == {
        f"model.layers.{n}.{each}"
        for n in range(2)
        for each in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    sampler.clear()
    assert not sampler.rows


@pytest.mark.parametrize("rows", [1, 5])
def test_the_device_is_waited_for_once_whatever_the_layers(rows: int) -> None:
    model = make_model("llama", num_hidden_layers=4)
    space = find_space(model)
    sampler = InputSampler(model, space)
    loss_of(model, batch(rows=rows)).backward()
    with Waits() as waits:
        compensate_(model, space, {"hidden": [1, 4]}, sampler)
    assert waits.count == 1
    with Waits() as waits:
        torch.linalg.solve(torch.eye(2), torch.ones(2, 1))
        torch.ones(1).item()
    assert waits.count == 2  # control


@pytest.mark.parametrize("rows", [1, 5])
def test_moments_that_cannot_be_solved_with_stop_it(rows: int) -> None:
    model = make_model("llama")
    space = find_space(model)
    sampler = InputSampler(model, space)
    loss_of(model, batch(rows=rows)).backward()
    sampler.collect()
    sampler.rows["model.layers.1.mlp.down_proj"][0][0, 0] = torch.inf
    with pytest.raises(TrainingError, match="not positive definite"):
        compensate_(model, space, {dim.name: [1, 4] for dim in space.bundles["ffn"].dims}, sampler)


def test_autocast_does_not_reach_the_solve() -> None:
    results = []
    for enabled in (True, False):
        model = make_model("llama", dtype=torch.float32)
        space = find_space(model)
        sampler = InputSampler(model, space)
        loss_of(model, batch()).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            compensate_(model, space, {dim.name: [1, 4] for dim in space.bundles["ffn"].dims}, sampler)
        results.append(model.model.layers[1].mlp.down_proj.weight.detach())
    assert torch.equal(*results)


def test_a_loop_that_has_its_own_head_is_compensated_too() -> None:
    """Oracle: the same loop through the model's own forward pass."""
    weights = []
    for own in (False, True):
        model = make_model("qwen2")
        space = find_space(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        target = int(0.8 * space.num_params(space.shape))
        pruner = Pruner(model, optimizer, target, pace=SlotPace(1), compensate=True)
        for step in range(3):
            tokens = batch(step)
            if own:
                h = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
                loss = cross_entropy(model.lm_head(h).flatten(0, 1).float(), tokens[:, 1:].flatten())
            else:
                loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(pruner.removals) >= 2
        weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-6, rtol=0)
