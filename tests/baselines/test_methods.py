"""The methods to compare with: their saliencies against what they are defined as, and each as a whole run."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from efficientllm.baselines.depth import block_influences, drop_layers_, least_influential, remove_layers_
from efficientllm.baselines.obs import diagonal_blocks, removal_errors
from efficientllm.baselines.one_shot import random_scores, remove_one_shot, unit_scores
from efficientllm.baselines.shapes import num_layers_left, start_config, with_layers
from efficientllm.cli import main
from efficientllm.config.checks import validate
from efficientllm.config.methods import METHODS
from efficientllm.config.run_config import RunConfig
from efficientllm.distributed.engine import Engine
from efficientllm.errors import BudgetError, ConfigError
from efficientllm.pruning.compensation import damped_, gram
from efficientllm.pruning.schedule import LinearPace
from efficientllm.pruning.trajectory import even, proportional, simulate, toward
from efficientllm.space import find_limits, find_space
from efficientllm.training.recipe import make_recipe
from efficientllm.training.size_target import Budget
from efficientllm.training.trainer import Trainer
from helpers.families import NAMES, VOCAB, logits, loss_of, make_config, make_model, numel
from helpers.paths import DEMO_MODEL

ROWS, LENGTH = 4, 12
CPU = torch.device("cpu")


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator) for _ in range(count)]


def make_trainer(method: str, share: float = 0.6, name: str = "llama", steps: int = 8, **more: Any) -> Trainer:
    """A tiny model in float64 that is to be cut to a share of its parameters."""
    source = make_model(name)
    space = find_space(source)
    limits = find_limits(space, source.config, min_ffn=8, min_hidden=6)
    tokens = ROWS * LENGTH
    config = RunConfig(
        seq_len=LENGTH,
        batch_tokens=tokens,
        micro_batch_size=2,
        target_params=int(share * space.num_params(limits.source)),
        prune_tokens=(steps - 2) * tokens,
        tokens=steps * tokens,
        lr=3e-3,
        method=method,
        **more,
    )
    recipe = make_recipe(config, space, limits)
    trainer = Trainer(source, config, recipe, limits, Engine(CPU), lambda size: None)
    trainer.batches = iter(batches(64))
    return trainer


def budget_of(trainer: Trainer) -> Budget:
    return Budget(trainer.pruner.measure, trainer.pruner.target_params)


def silent(done: int, batches: int) -> None:
    pass


# What goes of each kind


@pytest.mark.parametrize("heads", ["grouped", "multihead"])
def test_even_takes_the_same_share_of_hidden_size_ffn_and_heads(heads: str) -> None:
    model = make_model("llama", heads, hidden_size=48, intermediate_size=80)
    space = find_space(model)
    limits = find_limits(space, model.config, min_ffn=4, min_hidden=4)
    source, target = limits.source, space.num_params(limits.source) // 2

    def end(order: Any) -> dict[str, int]:
        return simulate(space.num_params, limits, [target], LinearPace(1), space.head_dim, order)[-1].shape

    shape = end(even(limits))
    heads_of = shape["kv"] * shape["query"], source["kv"] * source["query"]
    ratio = shape["hidden"] / source["hidden"]
    assert (
        0
        <= target - space.num_params(shape)
        < space.num_params({**shape, "ffn": 2}) - space.num_params({**shape, "ffn": 1})
    )
    assert shape["ffn"] / source["ffn"] == pytest.approx(ratio, abs=2 / source["hidden"])
    nearest = min(kv * query for kv in range(1, source["kv"] + 1) for query in range(1, source["query"] + 1))
    assert abs(heads_of[0] / heads_of[1] - ratio) <= source["query"] / heads_of[1] and heads_of[0] >= nearest
    if heads == "grouped":  # the planner's order takes KV groups and query heads each by the share: heads by its square
        other = end(proportional(limits))
        assert other["kv"] * other["query"] < heads_of[0]


def test_the_shape_of_another_run_is_met_exactly() -> None:
    trainer = make_trainer("magnitude")
    space = trainer.pruner.space
    goal = {"hidden": 17, "ffn": 31, "kv": 1, "query": 2}
    trainer = make_trainer("magnitude", space.num_params(goal) / space.num_params(space.shape) + 1e-9)
    assert trainer.pruner.target_params == space.num_params(goal)
    remove_one_shot(trainer, Budget(space.num_params, space.num_params(goal), goal=goal), silent)
    assert trainer.pruner.shape == goal and trainer.pruner.done
    assert toward(goal)(goal) == []


# Saliencies


def test_one_shot_saliency_is_the_mean_over_batches() -> None:
    trainer = make_trainer("one-shot", calibration_tokens=3 * ROWS * LENGTH)
    stock = make_model("llama")
    scores = unit_scores(trainer, 3, lambda count: None)
    down, embedding = stock.model.layers[1].mlp.down_proj.weight, stock.model.embed_tokens.weight
    channels, means = [], []
    for tokens in batches(3):
        stock.zero_grad()
        loss_of(stock, tokens).backward()
        channels.append((down * down.grad).abs().mean(0))
        written = [
            embedding,
            *(
                getattr(part, name).weight.T
                for layer in stock.model.layers
                for part, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj"))
            ),
        ]
        gradients = [
            embedding.grad,
            *(
                getattr(part, name).weight.grad.T
                for layer in stock.model.layers
                for part, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj"))
            ),
        ]
        means.append(torch.cat([(w * g).abs() for w, g in zip(written, gradients, strict=True)]).mean(0))
    torch.testing.assert_close(scores["ffn"][1], torch.stack(channels).mean(0), atol=0, rtol=1e-6, check_dtype=False)
    torch.testing.assert_close(scores["hidden"][0], torch.stack(means).mean(0), atol=0, rtol=1e-6, check_dtype=False)
    assert all(param.grad is None for param in trainer.model.parameters())  # the first step begins anew


def test_magnitude_is_the_mean_square_of_output_weights() -> None:
    scores = unit_scores(make_trainer("magnitude"), 0, lambda count: None)
    stock = make_model("llama")
    torch.testing.assert_close(scores["ffn"][0], stock.model.layers[0].mlp.down_proj.weight.detach().square().mean(0))
    o = stock.model.layers[1].self_attn.o_proj.weight.detach().square()
    torch.testing.assert_close(scores["kv"][1], o.view(24, 2, 24).mean((0, 2)))


def test_random_is_seeded() -> None:
    space = find_space(make_model("llama"))
    first, again, other = random_scores(space, 1), random_scores(space, 1), random_scores(space, 2)
    for kind in first:
        assert torch.equal(first[kind], again[kind]) and not torch.equal(first[kind], other[kind])


def test_obs_error_is_what_least_squares_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64
    )
    W = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    H = damped_(gram(X))
    A = torch.linalg.cholesky(H).T  # AᵀA = H: the damped inputs
    columns = W.view(5, 4, 3)
    found = removal_errors(
        diagonal_blocks(torch.linalg.inv(H), 0, 4, 3), torch.einsum("oub,ouc->ubc", columns, columns)
    )
    for unit in range(4):
        kept = [channel for channel in range(12) if channel // 3 != unit]
        best = torch.linalg.lstsq(A[:, kept], A @ W.T).solution
        error = (A @ W.T - A[:, kept] @ best).square().sum()
        torch.testing.assert_close(found[unit], error)
        zeroed = (A @ W.T - A[:, kept] @ W[:, kept].T).square().sum()
        assert error < 0.9 * zeroed  # without the update more is left


def inputs_of(model: Any, name: str, count: int) -> Tensor:
    """The rows that a module reads over so many batches."""
    rows: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, 1)))
    for tokens in batches(count):
        logits(model, tokens)
    hook.remove()
    return torch.cat(rows).detach()


def test_obs_scores_are_shares_of_the_output() -> None:
    trainer = make_trainer("one-shot-obs")
    scores = unit_scores(trainer, 2, lambda count: None)
    stock = make_model("llama")
    for kind, name, block in (("ffn", "mlp.down_proj", 1), ("kv", "self_attn.o_proj", 24)):
        X = inputs_of(stock, f"model.layers.1.{name}", 2)
        W, H = stock.get_parameter(f"model.layers.1.{name}.weight").detach(), damped_(gram(X))
        A = torch.linalg.cholesky(H).T
        for unit in (0, 1):
            kept = [channel for channel in range(W.shape[1]) if channel // block != unit]
            left = A @ W.T - A[:, kept] @ torch.linalg.lstsq(A[:, kept], A @ W.T).solution
            share = left.square().sum() / (A @ W.T).square().sum()
            assert float(scores[kind][1, unit]) == pytest.approx(float(share / (block * W.shape[0])), rel=1e-6)


def test_activation_is_fluctuation_times_squared_weights() -> None:
    trainer = make_trainer("activation")
    scores = unit_scores(trainer, 3, lambda count: None)
    stock = make_model("llama")
    parts = {
        name: inputs_of(stock, f"model.layers.0.{name}", 3).var(0, unbiased=False)
        for name in ("mlp.down_proj", "self_attn.o_proj")
    }
    down = parts["mlp.down_proj"] * stock.model.layers[0].mlp.down_proj.weight.detach().square().sum(0)
    torch.testing.assert_close(scores["ffn"][0], down / down.sum() / 24)
    o = parts["self_attn.o_proj"] * stock.model.layers[0].self_attn.o_proj.weight.detach().square().sum(0)
    torch.testing.assert_close(scores["kv"][0], o.view(2, 24).sum(1) / o.sum() / (24 * 24))
    one = unit_scores(make_trainer("activation"), 1, lambda count: None)
    assert not torch.allclose(one["ffn"][0], scores["ffn"][0])  # every batch counts


def test_rounds_of_obs_end_nearer_to_the_source_than_plain_removal() -> None:
    """The loss of what is left, before any training, on the calibration's own text."""
    left = {}
    for method in ("one-shot-obs", "random"):
        trainer = make_trainer(method, 0.9, calibration_tokens=16 * ROWS * LENGTH)
        source = make_model("llama")
        remove_one_shot(trainer, budget_of(trainer), silent)
        tokens = torch.cat(batches(8))
        with torch.no_grad():
            ours = trainer.model(input_ids=tokens, use_cache=False).logits
        left[method] = float((ours - logits(source, tokens)).square().mean())
    assert left["one-shot-obs"] < 0.8 * left["random"]


# All at once, and masks


@pytest.mark.parametrize("method", ["one-shot", "one-shot-obs", "magnitude", "activation", "random"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_everything_goes_before_the_first_step(method: str, allocation: str) -> None:
    trainer = make_trainer(method, allocation=allocation, calibration_tokens=32 * ROWS * LENGTH)
    seen: list[tuple[int, int]] = []
    remove_one_shot(trainer, budget_of(trainer), lambda done, total: seen.append((done, total)))
    pruner = trainer.pruner
    tile = pruner.space.num_params({**pruner.shape, "ffn": 2}) - pruner.space.num_params({**pruner.shape, "ffn": 1})
    assert 0 <= pruner.target_params - numel(trainer.model) < tile and pruner.done
    assert {removal.step for removal in pruner.removals} == {0} and trainer.step == 0
    assert seen == ([] if method in ("magnitude", "random") else [(done, 32) for done in range(1, 33)])
    before = numel(trainer.model)
    while not trainer.done:
        trainer.train_step()
    assert numel(trainer.model) == before and trainer.step == 8


def test_masks_remove_what_efficientllm_does_and_save_nothing() -> None:
    runs, shapes = {}, {}
    for method in ("efficientllm", "mask-only"):
        trainer = make_trainer(method, 0.6, steps=30)
        widths = []
        while not trainer.done:
            trainer.train_step()
            widths.append((trainer.phase, trainer.model.model.layers[0].mlp.down_proj.weight.shape[1]))
        runs[method], shapes[method] = trainer, [width for phase, width in widths if phase == "prune"]
    ours, masked = runs["efficientllm"], runs["mask-only"]
    rows = [[(each.step, each.kind, each.units) for each in run.pruner.removals] for run in (ours, masked)]
    assert rows[0] == rows[1] and len(rows[0]) > 20
    assert set(shapes["mask-only"]) == {40} and len(set(shapes["efficientllm"])) > 3
    for mine, theirs in zip(ours.model.parameters(), masked.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=0)  # norms compute in float32


# Depth


def test_block_influence_is_the_mean_of_one_minus_cosine() -> None:
    model = make_model("llama", num_hidden_layers=3)
    bare = copy.deepcopy(model)
    bare.model.norm = torch.nn.Identity()
    total = torch.zeros(3, dtype=torch.float64)
    for tokens in batches(2):
        states = bare.model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
        for layer in range(3):
            x, y = states[layer].detach(), states[layer + 1].detach()
            cosine = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
            total[layer] += (1 - cosine).mean() / 2
    found = block_influences(model, batches(2), 2, Engine(CPU))
    assert found == pytest.approx(total.tolist(), rel=1e-5)
    assert least_influential([0.3, 0.1, 0.2, 0.1], 3) == [1, 3, 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_some_layers_is_a_stock_one(name: str, tmp_path: Path) -> None:
    model = make_model(name, num_hidden_layers=5)
    before = logits(model)
    weights = {key: param.clone() for key, param in model.state_dict().items()}
    drop_layers_(model, [0, 2])
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert len(reloaded.model.layers) == 3
    torch.testing.assert_close(logits(reloaded), logits(model), atol=0, rtol=0)
    assert not torch.allclose(logits(model), before)
    # a stock model of the layers' own config with their weights
    stock = AutoModelForCausalLM.from_config(
        with_layers(make_config(name, num_hidden_layers=5), [1, 3, 4]), dtype=torch.float64
    )
    for new, old in enumerate([1, 3, 4]):
        part = f"model.layers.{old}."
        stock.model.layers[new].load_state_dict(
            {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
        )
    rest = {key: value for key, value in weights.items() if ".layers." not in key}
    stock.load_state_dict(rest, strict=False)
    torch.testing.assert_close(logits(stock), logits(model), atol=0, rtol=0)
    generated = model.generate(batches(1)[0][:1, :4], max_new_tokens=4, do_sample=False)  # the cache counts layers
    assert torch.equal(generated, reloaded.generate(batches(1)[0][:1, :4], max_new_tokens=4, do_sample=False))


def test_layers_go_by_their_influence() -> None:
    model = make_model("llama", num_hidden_layers=4)
    with torch.no_grad():  # a layer that writes nothing has no influence
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    before, params = logits(model), numel(model)
    removals = remove_layers_(model, model, batches(1), 3, 2, Engine(CPU))
    assert [removal.units for removal in removals] == [{"layers": 2}]
    assert removals[0].saliencies["layer"] == pytest.approx(0, abs=1e-6)
    assert (removals[0].params_before, removals[0].params_after) == (params, numel(model))
    torch.testing.assert_close(logits(model), before)


def test_depth_leaves_the_most_layers_that_fit(tmp_path: Path) -> None:
    source = make_config("llama", num_hidden_layers=5)
    sizes = [numel(AutoModelForCausalLM.from_config(with_layers(source, range(layers)))) for layers in (1, 2, 3, 4, 5)]
    for target, expected in ((sizes[0], 1), (sizes[2] - 1, 2), (sizes[2], 3), (sizes[3] + 1, 4), (sizes[4], 5)):
        assert num_layers_left(RunConfig(target_params=target), source) == expected
    for target in (sizes[0] - 1, sizes[4] + 1):
        with pytest.raises(BudgetError, match="--method depth can reach"):
            num_layers_left(RunConfig(target_params=target), source)


# Flags


def given(**values: Any) -> RunConfig:
    base = {"model": "m", "data": ("d",), "out": "o", "tokens": 4096, "seq_len": 64, "batch_tokens": 512}
    return RunConfig(**(base | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "scratch"}, ["--method scratch needs --shape-of"]),
        ({"method": "scratch", "shape_of": "r", "target_params": 9}, ["--target-params", "scratch"]),
        ({"method": "scratch", "shape_of": "r", "prune_tokens": 9}, ["--prune-tokens", "scratch"]),
        ({"method": "one-shot", "shape_of": "r", "target_params": 9}, ["--shape-of", "--target-params"]),
        ({"method": "one-shot", "shape_of": "r", "allocation": "global"}, ["--shape-of", "--allocation"]),
        ({"method": "one-shot", "target_params": 9, "save_at": (10,)}, ["--save-at", "before the first step"]),
        ({"method": "one-shot", "target_params": 9, "slot_steps": 1.0}, ["--slot-steps"]),
        ({"method": "one-shot", "target_params": 9, "score_ema": 0.9}, ["--score-ema"]),
        ({"method": "one-shot-obs", "target_params": 9, "saliency": "taylor2"}, ["--saliency"]),
        ({"method": "magnitude", "target_params": 9, "calibration_tokens": 9}, ["--calibration-tokens"]),
        ({"method": "depth", "target_bytes": 9, "for_type": "q8_0"}, ["--target-bytes"]),
        ({"method": "depth", "target_params": 9, "min_ffn": 9}, ["--min-ffn"]),
        ({"method": "one-shot", "target_params": 9, "layout": "per-layer"}, ["--layout", "before the first step"]),
        (
            {"method": "scratch", "shape_of": "r", "distill": "source", "distill_hidden": 1.0},
            ["--distill-hidden", "fresh weights"],
        ),
        ({"target_params": 9, "prune_tokens": 9, "allocation": "global"}, ["--allocation", "efficientllm"]),
        ({"target_params": 9, "prune_tokens": 9, "shape_of": "r"}, ["--shape-of", "efficientllm"]),
        ({"method": "mask-only", "target_params": 9}, ["--prune-tokens", "must set the pace"]),
        ({"method": "one-shott", "target_params": 9}, ["did you mean one-shot?"]),
    ],
)
def test_flags_that_mean_nothing_are_refused(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(given(**values))
    assert all(word in str(refused.value) for word in words), refused.value


def test_what_methods_take() -> None:
    validate(given(method="one-shot", target_params=9))
    validate(
        given(
            method="one-shot",
            target_params=9,
            prune_tokens=2048,
            compensate=True,
            saliency="taylor2",
            scored_layers="all",
        )
    )
    validate(given(method="scratch", shape_of="r"))
    validate(given(method="depth", target_params=9, calibration_tokens=512))
    validate(given(method="mask-only", target_params=9, slot_steps=1.0, save_at=(10,)))


def test_every_method_has_the_learning_rate_of_the_run_it_is_compared_with() -> None:
    space = find_space(make_model("llama"))
    limits = find_limits(space, make_config("llama"))
    target = space.num_params(limits.source) // 2
    recipes = [
        make_recipe(given(method=method, target_params=target, prune_tokens=100 * 512, tokens=300 * 512), space, limits)
        for method in METHODS
        if method != "scratch"
    ]
    assert {(each.total_steps, each.warmup_steps, each.decay_steps, each.lr) for each in recipes} == {
        (300, 7, 90, 3e-3)
    }


# Whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    texts = [f"Return item {n} of the list {'and the next ' * (n % 7)}or raise IndexError. " * 6 for n in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def words_of(data: Path, out: Path, method: str, *more: str) -> list[str]:
    words = ["prune", str(DEMO_MODEL), "--data", str(data), "--out", str(out), "--method", method, "--tokens", "3072"]
    words += ["--seq-len", "64", "--batch-tokens", "512", "--valid-tokens", "1024", "--checkpoint-every", "2", *more]
    if METHODS[method].when == "gradual":
        words += ["--prune-tokens", "1536"]
    if "calibration_tokens" in METHODS[method].takes:
        words += ["--calibration-tokens", "2048"]
    return words if "--shape-of" in more else [*words, "--target-params", "560000"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def one_shot(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one-shot"
    assert main(words_of(data, out, "one-shot")) == 0
    return out


def bytes_of(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in ("model/model.safetensors", "removals.jsonl")]


def check_resume(out: Path, tmp_path: Path) -> None:
    """From the checkpoint before the decay, and from nothing at all, a run ends with the same bytes."""
    for case, gone in (("middle", ["model", "checkpoints/step-00000006"]), ("start", ["model", "checkpoints"])):
        cut = tmp_path / case
        shutil.copytree(out, cut)
        for name in gone:
            shutil.rmtree(cut / name)
        assert main(["prune", "--resume", "--out", str(cut)]) == 0
        assert bytes_of(cut) == bytes_of(out), case


def check_run(out: Path, method: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert f"`{method}`" in (out / "model/README.md").read_text()
    assert f"method: {method}\n" in (out / "config.yaml").read_text()
    metrics = rows(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(7)) and metrics[-1]["params"] == numel(model)
    return model


def test_a_one_shot_run(one_shot: Path, tmp_path: Path) -> None:
    model = check_run(one_shot, "one-shot")
    removals, first, second, *_ = rows(one_shot / "removals.jsonl"), *rows(one_shot / "metrics.jsonl")
    assert {row["step"] for row in removals} == {0} and removals[-1]["params_after"] == numel(model) <= 560_000
    assert first["params"] == removals[0]["params_before"] > second["params"] == numel(model)
    assert first["removed_valid_loss"] > first["valid_loss"]
    check_resume(one_shot, tmp_path)


def test_scratch_has_the_shape_and_weights_of_its_own(one_shot: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scratch"
    assert main(words_of(data, out, "scratch", "--shape-of", str(one_shot))) == 0
    fresh, pruned = check_run(out, "scratch"), AutoModelForCausalLM.from_pretrained(one_shot / "model")
    shapes = [{name: param.shape for name, param in model.named_parameters()} for model in (fresh, pruned)]
    assert shapes[0] == shapes[1]
    assert all(
        not torch.allclose(a, b) for a, b in zip(fresh.parameters(), pruned.parameters(), strict=True) if a.ndim > 1
    )
    assert not rows(out / "removals.jsonl")
    check_resume(out, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scratch", "depth"])
def test_what_begins_small_learns_from_the_source(
    method: str, one_shot: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, shape = tmp_path / "run", ["--shape-of", str(one_shot)] if method == "scratch" else []
    assert main(words_of(data, out, method, *shape, "--distill")) == 0
    source = numel(AutoModelForCausalLM.from_pretrained(DEMO_MODEL))
    assert f"teacher {DEMO_MODEL}: {source:,} parameters" in " ".join(capsys.readouterr().out.split())
    check_run(out, method)
    assert all(row["kl"] > 0 for row in rows(out / "metrics.jsonl")[1:])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["one-shot-obs", "depth"])
def test_a_run_of_another_method_resumes(method: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(words_of(data, out, method)) == 0
    model, first = check_run(out, method), rows(out / "metrics.jsonl")[0]
    assert first["params"] > numel(model) and first["removed_valid_loss"] > first["valid_loss"]
    kinds = {row["kind"] for row in rows(out / "removals.jsonl")}
    assert kinds == ({"layer"} if method == "depth" else {"ffn", "hidden"})  # heads are at a nearer share as they are
    check_resume(out, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mask-only", "magnitude", "activation", "random"])
def test_a_run_of_another_method(method: str, one_shot: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    gradual = METHODS[method].when == "gradual"
    assert main(words_of(data, out, method, *([] if gradual else ["--shape-of", str(one_shot)]), "--distill")) == 0
    model = check_run(out, method)
    assert all(row["kl"] > 0 for row in rows(out / "metrics.jsonl")[2:])
    if not gradual:
        config, goal = model.config, AutoConfig.from_pretrained(one_shot / "model")
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            assert getattr(config, name) == getattr(goal, name)


def test_shapes_that_cannot_be_taken_over(
    one_shot: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, words in (
        ({"num_hidden_layers": 1}, "layers"),
        ({"intermediate_size": 5000}, "ffn 5000"),
        ({"vocab_size": 77}, "77 tokens"),
    ):
        folder = tmp_path / "shape"
        folder.mkdir(exist_ok=True)
        config = json.loads((one_shot / "model/config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        capsys.readouterr()
        assert main(words_of(data, tmp_path / "out", "random", "--shape-of", str(folder))) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert start_config(given(model=str(DEMO_MODEL), method="scratch", shape_of=str(one_shot))).hidden_size < 5000


def test_plan_knows_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "plan",
                str(DEMO_MODEL),
                "--target-params",
                "560000",
                "--prune-tokens",
                "1M",
                "--tokens",
                "2M",
                "--method",
                "random",
            ]
        )
        == 2
    )
    assert "--method random" in capsys.readouterr().err
