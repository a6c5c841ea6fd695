"""Pruner in real loops: every kind of loop shrinks its model and keeps learning, and bookkeeping changes nothing."""

import copy
import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from efficientllm import Pruner
from efficientllm.errors import BudgetError, CheckpointError, UnsupportedModelError
from efficientllm.pruning import LinearPace, SlotPace
from efficientllm.pruning.landing import ffn_tile_size
from efficientllm.space import find_space
from helpers.families import EVERY, LAYERS, NAMES, loss_of, make_model, numel, stock
from helpers.loops import adamw, assert_landed, assert_same_models, limits_of, loop, prune, rows, target_of, text

# --- loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate", [False, True])
def test_a_hand_written_loop_shrinks_and_learns(compensate: bool) -> None:
    model = make_model("llama", dtype=torch.float32)
    target, source = target_of(model), numel(model)
    pruner = prune(model, compensate=compensate, pace=LinearPace(60, 5))
    losses = loop(pruner, 150)
    assert_landed(pruner, target)
    assert sum(losses[-10:]) / 10 < min(3.0, 0.7 * losses[0]), losses
    assert len({removal.kind for removal in pruner.removals}) >= 2
    sizes = [removal.params_before for removal in pruner.removals] + [pruner.num_params]
    assert sizes[0] == source and all(a.params_after == b for a, b in zip(pruner.removals, sizes[1:], strict=True))


def test_a_closure_loop_does_the_same() -> None:
    by_hand = prune(make_model("llama"))
    loop(by_hand, 25, clip=False)
    for keyword in (False, True):
        pruner = prune(make_model("llama"))
        for step in range(25):

            def closure(step: int = step, pruner: Pruner = pruner) -> Tensor:
                pruner.optimizer.zero_grad()
                loss = loss_of(pruner.model, text(step))
                loss.backward()
                return loss

            loss = pruner.optimizer.step(closure=closure) if keyword else pruner.optimizer.step(closure)
            assert loss is not None
        assert rows(pruner) == rows(by_hand) and rows(pruner)
        assert_same_models(pruner.model, by_hand.model)


class Compare(TrainerCallback):
    """Loads every folder that the Trainer saves, and keeps the losses that it logs."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.losses: list[float] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        loaded = AutoModelForCausalLM.from_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        with torch.no_grad():
            expected = model(input_ids=text(0), use_cache=False).logits
            torch.testing.assert_close(loaded(input_ids=text(0), use_cache=False).logits, expected)
        self.sizes.append(numel(loaded))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # its name until v6
@pytest.mark.parametrize("compensate", [False, True])
def test_the_hugging_face_trainer_shrinks_saves_and_learns(tmp_path: Path, compensate: bool) -> None:
    model = make_model("qwen2", dtype=torch.float32)
    optimizer, target = adamw(model), target_of(model)
    pruner = prune(model, optimizer, compensate=compensate, pace=LinearPace(30, 3), compaction_tile=4)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=60, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=10,
        gradient_checkpointing=True, logging_steps=5, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        learning_rate=3e-3, dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for step in range(130) for row in text(step)]
    compare = Compare()
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[compare]
    )
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer, "accelerate wraps the optimizer that the hooks sit on"
    assert pruner.step == 60, "one step for two micro-batches"
    assert_landed(pruner, target)
    assert len(compare.sizes) == 6 and compare.sizes[0] > compare.sizes[1] > compare.sizes[3] == pruner.num_params
    assert compare.losses[-1] < 0.75 * compare.losses[0]
    assert len(list(tmp_path.glob("checkpoint-*/model.safetensors"))) == 6


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # its name until v6
def test_gradient_checkpointing_changes_nothing_of_variant_b() -> None:
    plain = prune(make_model("llama"), compensate=True)
    loop(plain, 22)
    for reentrant in (False, True):
        model = make_model("llama")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        pruner = prune(model, compensate=True)
        loop(pruner, 22)
        assert rows(pruner) == rows(plain) and rows(plain)
        assert_same_models(pruner.model, plain.model, atol=1e-7)
    first_order = prune(make_model("llama"))
    loop(first_order, 22)
    assert rows(first_order)[0] == rows(plain)[0]
    with pytest.raises(AssertionError):
        assert_same_models(first_order.model, plain.model, atol=1e-3)  # control: B does something


def test_accumulated_gradients_score_like_one_batch() -> None:
    whole, parts = prune(make_model("llama"), compensate=True), prune(make_model("llama"), compensate=True)
    loop(whole, 22, clip=False)
    for step in range(22):
        parts.optimizer.zero_grad()
        for half in text(step).split(2):
            (loss_of(parts.model, half) / 2).backward()
        parts.optimizer.step()
    assert rows(whole) == rows(parts)
    assert_same_models(whole.model, parts.model, atol=1e-6)


# --- when shapes change is a matter of speed ------------------------------------------------------------------------


def assert_tiles_do_not_matter(name: str, heads: str, steps: int = 26, **settings: Any) -> None:
    pruners = []
    for tile in (1, 7, 1000):
        model = make_model(name, heads)
        settings = {"pace": SlotPace(0.06, 2), **settings}
        pruner = prune(model, compaction_tile=tile, **settings)
        pruners.append(pruner)
        loop(pruner, steps)
    each = pruners[0]
    assert len(rows(each)) > 8 and len({removal.kind for removal in each.removals}) >= 2
    for other in pruners[1:]:
        assert rows(other) == rows(each)
        for one, two in zip(each.removals, other.removals, strict=True):
            assert one.saliencies == pytest.approx(two.saliencies, rel=1e-5)
            assert (one.params_before, one.params_after) == (two.params_before, two.params_after)
        other.compact()
        each.compact()
        assert_same_models(each.model, other.model, atol=1e-7)
        assert other.shape == each.shape and other.state_dict()["origin"] == each.state_dict()["origin"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name, heads", [("llama", "grouped"), ("olmo2", "multihead"), ("gemma3_text", "grouped")])
@pytest.mark.parametrize("settings", [{}, {"compensate": True}, {"score": "all", "score_ema": 0.8}])
def test_compacting_at_once_or_later_is_the_same(name: str, heads: str, settings: dict[str, Any]) -> None:
    assert_tiles_do_not_matter(name, heads, **settings)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name, heads", EVERY)
@pytest.mark.parametrize("compensate", [False, True], ids=["A", "B"])
@pytest.mark.parametrize("score", ["output", "all"])
@pytest.mark.parametrize("saliency", ["taylor1", "taylor2"])
def test_compacting_at_once_or_later_is_the_same_for_all(
    name: str, heads: str, compensate: bool, score: Any, saliency: Any
) -> None:
    assert_tiles_do_not_matter(name, heads, compensate=compensate, score=score, saliency=saliency)


@pytest.mark.slow
@pytest.mark.parametrize("name, heads", EVERY)
@pytest.mark.parametrize("compensate", [False, True], ids=["A", "B"])
def test_every_family_and_variant_lands_learns_and_loads(
    name: str, heads: str, compensate: bool, tmp_path: Path
) -> None:
    model = make_model(name, heads, dtype=torch.float32)
    target = target_of(model)
    pruner = prune(model, compensate=compensate, pace=LinearPace(60, 5))
    losses = loop(pruner, 150)
    assert_landed(pruner, target)
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]
    assert_loads(model, tmp_path)


@pytest.mark.parametrize("name, heads", [(name, "multihead" if n % 2 else "grouped") for n, name in enumerate(NAMES)])
def test_every_family_lands_and_loads(name: str, heads: str, tmp_path: Path) -> None:
    model = make_model(name, heads, dtype=torch.float32)
    target = target_of(model, 0.4)
    pruner = prune(model, target=target, pace=LinearPace(6, 1))
    loop(pruner, 8)
    assert_landed(pruner, target)
    assert_loads(model, tmp_path)


def assert_loads(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model(input_ids=text(0), use_cache=False).logits
        torch.testing.assert_close(loaded(input_ids=text(0), use_cache=False).logits, expected)
    assert numel(loaded) == numel(model)


# --- what is recorded -----------------------------------------------------------------------------------------------


def test_the_same_seed_removes_the_same() -> None:
    runs = []
    for seed in (0, 0, 1):
        pruner = prune(make_model("llama", seed=seed, dtype=torch.float32))
        loop(pruner, 22)
        runs.append([removal.as_row() for removal in pruner.removals])
    assert runs[0] == runs[1] != runs[2]


def test_rows_name_one_unit_of_every_layer_as_the_source_does() -> None:
    model = make_model("llama", seed=3)
    pruner = prune(model, target=target_of(model, 0.15), compaction_tile=5)
    loop(pruner, 22)
    gone: dict[str, set[int]] = {}
    left_kv = {number: {0, 1} for number in range(LAYERS)}
    assert {removal.kind for removal in pruner.removals} == {"hidden", "ffn", "kv", "query"}
    for removal in pruner.removals:
        if removal.kind == "hidden":
            assert set(removal.units) == {"hidden"}
        elif removal.kind == "query":  # of the KV groups that are left, whatever waits to be compacted
            expected = {f"layers.{number}.query.{kv}" for number, groups in left_kv.items() for kv in groups}
            assert set(removal.units) == expected
        else:
            assert set(removal.units) == {f"layers.{number}.{removal.kind}" for number in range(LAYERS)}
        for name, unit in removal.units.items():
            assert unit not in gone.setdefault(name, set()), "removed twice"
            gone[name].add(unit)
            if removal.kind == "kv":
                left_kv[int(name.split(".")[1])].remove(unit)
        assert removal.kind in removal.saliencies
        assert removal.params_after < removal.params_before
    source = {dim.name: dim.size for dim in find_space(make_model("llama")).dims()}
    for name, units in pruner.state_dict()["origin"].items():
        if ".query." not in name:
            assert sorted({*units, *gone.get(name, ())}) == list(range(source[name]))
            assert units == sorted(units) and not set(units) & gone.get(name, set())


@pytest.mark.usefixtures("float64")
def test_the_rows_say_which_weights_are_left() -> None:
    """With a learning rate of zero the result is the source without the units that the rows name."""
    source, model = make_model("llama", seed=3), make_model("llama", seed=3)
    pruner = prune(model, adamw(model, lr=0.0), target=target_of(model, 0.4), compaction_tile=3)
    loop(pruner, 22)
    kept = {
        name: list(range(size)) for name, size in (("hidden", 24), *((f"layers.{n}.ffn", 40) for n in range(LAYERS)))
    }
    for removal in pruner.removals:
        for name, unit in removal.units.items():
            if name in kept:
                kept[name].remove(unit)
    assert len(kept["hidden"]) < 24 and len(kept["layers.0.ffn"]) < 40
    for number in range(LAYERS):
        expected = source.model.layers[number].mlp.down_proj.weight[kept["hidden"]][:, kept[f"layers.{number}.ffn"]]
        assert torch.equal(model.model.layers[number].mlp.down_proj.weight, expected)
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight[:, kept["hidden"]])


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_target_equal_to_the_source_is_plain_training(name: str) -> None:
    plain = make_model(name, dtype=torch.float32)
    optimizer = adamw(plain)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(plain, text(step)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for settings in ({}, {"compensate": True, "score_ema": 0.5}):
        model = make_model(name, dtype=torch.float32)
        pruner = prune(model, target=numel(model), **settings)
        assert pruner.done
        loop(pruner, 6)
        assert not pruner.removals and pruner.step == 6
        assert_same_models(model, plain)


def test_a_ladder_is_landed_on_rung_by_rung(tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.float32)
    saved_sizes = [target_of(model, share) for share in (0.8, 0.6, 0.3)]
    seen: list[tuple[int, int]] = []

    def on_landing(size: int) -> None:
        assert_loads(model, tmp_path / str(size))
        tile = ffn_tile_size(pruner.shape, pruner.limits, pruner.space.num_params)
        assert size - tile < numel(model) == pruner.num_params <= size
        seen.append((size, pruner.removals[-1].step))

    pruner = prune(model, target=saved_sizes[2], save_at=saved_sizes[:2], on_landing=on_landing, compaction_tile=6)
    assert pruner.targets == saved_sizes
    loop(pruner, 24)
    assert [size for size, _ in seen] == saved_sizes and seen[0][1] < seen[1][1] < seen[2][1]
    assert_landed(pruner, saved_sizes[2])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / str(saved_sizes[1]), dtype=torch.float32)
    later = prune(again, target=saved_sizes[2])
    loop(later, 24)
    assert_landed(later, saved_sizes[2])


def test_a_pace_that_has_run_out_removes_everything_at_once() -> None:
    model = make_model("llama")
    target = target_of(model, 0.2)
    pruner = prune(model, pace=LinearPace(3, 2), target=target)
    loop(pruner, 3)
    assert_landed(pruner, target)
    assert {removal.step for removal in pruner.removals} == {3}


def test_targets_that_cannot_be_reached() -> None:
    model = make_model("llama")
    for target, message in ((numel(model) + 1, "above the source's"), (10, "below the smallest"), (0, "positive")):
        with pytest.raises(BudgetError, match=message):
            prune(model, target=target if target else -1)
    frozen = limits_of(model, min_ffn=model.config.intermediate_size)  # nothing fine-grained is left to go
    with pytest.raises(BudgetError, match="lies within one FFN tile"):
        prune(model, target=numel(model) - 1, limits=replace(frozen, tile={**frozen.tile, "hidden": 8}))
    assert "save_pretrained" not in vars(model)


def test_rungs_that_exclude_one_another_are_refused_at_the_start() -> None:
    """Each can be landed on alone, but the shapes that land on the first leave no way to the second."""
    model = make_model("llama", num_attention_heads=8)
    limits = limits_of(model, min_ffn=40, min_hidden=24)  # only heads can go
    num_params, source = find_space(model).num_params, limits.source
    higher, lower = num_params({**source, "query": 2}), num_params({**source, "kv": 1})
    assert source["kv"] == 2 and source["query"] == 4 and higher > lower
    for target in (higher, lower):
        prune(model, target=target, limits=limits).close()
    with pytest.raises(BudgetError, match=f"target {lower:,}: no legal shape .* once it has landed on {higher:,}"):
        prune(model, target=lower, save_at=[higher], limits=limits)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = make_model("llama"), make_model("llama")
    match = r"does not hold \d+ parameters of this model, such as 'model.embed_tokens.weight'"
    with pytest.raises(UnsupportedModelError, match=match):
        prune(model, adamw(other))


def test_adafactor_is_refused_before_anything_changes() -> None:
    model = make_model("llama")
    pruner = prune(model, torch.optim.Adafactor(model.parameters()), pace=LinearPace(5))
    with pytest.raises(UnsupportedModelError, match="Adafactor keeps 'row_var'"):
        loop(pruner, 1)
    assert numel(model) == numel(make_model("llama")) and not pruner.removals
    assert all(param.any() for param in model.parameters())


# --- saving and state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma", "phi3"])
def test_saving_in_the_middle_compacts_first(name: str, tmp_path: Path) -> None:
    model = make_model(name, dtype=torch.float32)
    pruner = prune(model, compaction_tile=1000)
    loop(pruner, 12)
    assert pruner.state_dict()["retired"] and numel(model) > pruner.num_params
    with torch.no_grad():
        pending = model(input_ids=text(0), use_cache=False).logits
    assert_loads(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=text(0), use_cache=False).logits, pending)
    assert numel(model) == pruner.num_params < numel(make_model(name))
    loop(pruner, 12, start=12)
    assert pruner.done


def test_saving_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    saved, other = prune(make_model("llama"), compaction_tile=9), prune(make_model("llama"), compaction_tile=9)
    for step in range(22):
        loop(saved, 1, start=step)
        loop(other, 1, start=step)
        if step in (7, 12):
            saved.model.save_pretrained(tmp_path)
    assert rows(saved) == rows(other)
    assert_same_models(saved.model, other.model, atol=1e-6)


def test_a_constrained_family_says_when_it_can_be_saved(tmp_path: Path) -> None:
    """transformers would write half of a folder before it notices."""
    model = make_model("gemma2")
    pruner = prune(model)
    model.config.hidden_size = model.config.num_attention_heads * 5 + 1
    with pytest.raises(UnsupportedModelError, match="gemma2 cannot be saved at hidden size"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists() and not pruner.done


def test_close_leaves_the_model_alone(tmp_path: Path) -> None:
    model = make_model("gemma")
    optimizer = adamw(model)
    pruner = prune(model, optimizer, compaction_tile=1000, compensate=True)
    loop(pruner, 10)
    count = len(pruner.removals)
    pruner.close()
    assert numel(model) == pruner.num_params and "save_pretrained" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    loop(pruner, 10, start=10)
    assert len(pruner.removals) == count and pruner.step == 10
    other = stock(model.config)
    other.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)


def test_a_pruner_that_is_gone_lets_its_model_be_saved(tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.float32)
    optimizer = adamw(model)
    pruner = prune(model, optimizer)
    twin = copy.deepcopy(model)
    reference = weakref.ref(pruner)
    optimizer.zero_grad()
    del pruner, optimizer
    gc.collect()
    assert reference() is None
    assert_loads(model, tmp_path / "a")
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()
    assert_loads(twin, tmp_path / "b")  # a copy saves itself, not what it was copied from


@pytest.mark.parametrize("settings", [{}, {"score_ema": 0.7, "saliency": "taylor2"}, {"compensate": True}])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_state_continues_bitwise(name: str, settings: dict[str, Any]) -> None:
    def make(model: Any, limits: Any) -> Pruner:
        return prune(
            model,
            target=target,
            limits=limits,
            compaction_tile=6,
            pace=LinearPace(20, 2),
            save_at=[saved_size],
            **settings,
        )

    model = make_model(name, dtype=torch.float32)
    limits, target, saved_size = limits_of(model), target_of(model, 0.3), target_of(model, 0.9)
    whole = make(model, limits)
    loop(whole, 11)
    state = whole.state_dict()
    average = {kind: score.clone() for kind, score in state.pop("average").items()}
    stored = json.loads(json.dumps(state))
    assert stored["retired"], "nothing is pending: the test is too easy"
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    moments = copy.deepcopy(whole.optimizer.state_dict())
    half = stock(model.config, torch.float32)
    half.load_state_dict(weights)
    resumed = make(half, limits)
    resumed.optimizer.load_state_dict(moments)
    resumed.load_state_dict({**stored, "average": average})
    before = len(whole.removals)
    for pruner in (whole, resumed):
        loop(pruner, 14, start=11)
    assert [r.as_row() for r in whole.removals[before:]] == [r.as_row() for r in resumed.removals] and resumed.removals
    assert_same_models(whole.model, resumed.model)
    assert_landed(resumed, target)
    assert json.loads(json.dumps(state)) == stored, "the state was shared with the run that went on"


def test_a_finished_state_is_taken_up_too() -> None:
    model = make_model("llama")
    limits, target = limits_of(model), target_of(model)
    pruner = prune(model, target=target)
    loop(pruner, 22)
    again = stock(model.config)
    again.load_state_dict(model.state_dict())
    resumed = prune(again, target=target, limits=limits, compensate=True)
    resumed.load_state_dict({**json.loads(json.dumps({**pruner.state_dict(), "average": {}}))})
    assert resumed.done and resumed.step == 22 and resumed.source_params == pruner.source_params
    loop(resumed, 2)
    assert not resumed.removals


def test_a_state_of_another_shape_is_refused() -> None:
    pruner, fresh = prune(make_model("llama")), prune(make_model("llama"))
    loop(pruner, 22)
    with pytest.raises(CheckpointError, match=r"'\w+.*' has \d+ units there"):
        fresh.load_state_dict(pruner.state_dict())
    assert fresh.step == 0


# --- odd steps ------------------------------------------------------------------------------------------------------


def backward(pruner: Pruner, step: int, then: Callable[[], None] | None = None) -> None:
    pruner.optimizer.zero_grad()
    loss_of(pruner.model, text(step)).backward()
    if then:
        then()


def test_broken_gradients_choose_nothing() -> None:
    pruner = prune(make_model("llama"), pace=LinearPace(20), score_ema=0.5)
    for broken in (torch.nan, torch.inf):
        backward(pruner, 0)
        pruner.model.model.layers[0].mlp.down_proj.weight.grad[1, 2] = broken
        pruner.score()
        assert pruner.state_dict()["average"] == {}
    pruner.optimizer.zero_grad()
    pruner.optimizer.step()  # without any gradient
    assert not pruner.removals and pruner.step == 1
    backward(pruner, 1)
    pruner.optimizer.step()
    assert pruner.removals and {removal.step for removal in pruner.removals} == {2}


def test_a_skipped_step_leaves_no_plan_behind() -> None:
    """A loop that scores and then skips its step plans anew from the next gradients."""
    skipping, plain = prune(make_model("llama"), pace=SlotPace(0.5)), prune(make_model("llama"), pace=SlotPace(0.5))
    backward(skipping, 99)
    skipping.score()  # and no step
    for pruner in (skipping, plain):
        for step in range(6):
            backward(pruner, step)
            pruner.score()
            nn.utils.clip_grad_norm_(pruner.model.parameters(), 1e-3)
            pruner.optimizer.step()
    assert rows(skipping) == rows(plain) and rows(plain)
    assert_same_models(skipping.model, plain.model)


def test_scores_may_come_before_clipping() -> None:
    """First-order scores do not see a factor on all gradients; the Fisher form does, so it is scored before."""

    def run(score_first: bool, saliency: Any) -> Pruner:
        pruner = prune(make_model("llama"), saliency=saliency, pace=LinearPace(10))
        for step in range(10):
            backward(pruner, step)
            for param in pruner.model.parameters():
                param.grad *= 1e4  # the second-order term counts
            if score_first:
                pruner.score()
            nn.utils.clip_grad_norm_(pruner.model.parameters(), 1e-2)
            pruner.optimizer.step()
        return pruner

    assert rows(run(True, "first")) == rows(run(False, "first"))
    assert rows(run(True, "fisher")) != rows(run(False, "fisher"))


def test_removals_leave_frozen_parameters_frozen() -> None:
    model = make_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    pruner = prune(model, adamw(nn.ModuleList([model.model.layers, model.model.norm, model.lm_head])))
    loop(pruner, 22)
    assert pruner.done and not model.model.embed_tokens.weight.requires_grad


def test_an_average_does_not_depend_on_how_long_scores_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """They join it when a removal is due, when too many wait, before units are numbered anew, and in a state."""
    kept = []
    for most in (1, 3, 64):
        monkeypatch.setattr("efficientllm.pruning.scoring.MOST_WAITING", most)
        pruner = prune(make_model("llama"), pace=SlotPace(4), score_ema=0.9)
        loop(pruner, 30)
        pruner.compact()
        loop(pruner, 7, start=30)
        kept.append((rows(pruner), pruner.state_dict()["average"]))
    (first, average), *others = kept
    assert len(first) > 5 and not pruner.done
    for same, scores in others:
        assert same == first and scores.keys() == average.keys() != set()
        assert all(torch.equal(scores[name], average[name]) for name in average)
    plain = prune(make_model("llama"), pace=SlotPace(4))
    loop(plain, 37)
    assert rows(plain) != first  # the negative control: the average counts
