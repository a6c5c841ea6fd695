"""The planner: against the paper's trajectory, a real run, torch's own FLOP counter and the tensors of a real step."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from efficientllm.config.run_config import RunConfig
from efficientllm.errors import ConfigError
from efficientllm.planning.run_plan import make_plan, read_kinds
from efficientllm.pruning import LinearPace, Pruner, SlotPace
from efficientllm.pruning.trajectory import as_logged, proportional, pruning_steps, simulate, spans
from efficientllm.space import Limits, Space, find_limits, find_space
from efficientllm.terminal.plan import print_plan
from efficientllm.training.memory_estimate import PassSetup, divisors, fitting_micro_batch
from efficientllm.training.recipe import make_recipe
from efficientllm.training.teacher import pass_flops
from helpers.memory import memory_of

BATCH_TOKENS = 2**20
# docs/method.md section 4: tokens (B), heads, f, d of SmolLM-1.7B on its way, measured off the paper's figure
PUBLISHED = (
    (3.2, 28, 8162, 2048),
    (10, 27, 7501, 2048),
    (20, 26, 6510, 2048),
    (38, 24, 4739, 2048),
    (50, 21, 3774, 1991),
    (60, 20, 3357, 1702),
    (70, 19, 3102, 1330),
    (73.8, 19, 3008, 1179),
)


def llama(**sizes: int) -> LlamaConfig:
    tiny = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "vocab_size": 130,
    }
    return LlamaConfig(**(tiny | sizes), tie_word_embeddings=True)


def smollm(num_key_value_heads: int = 32) -> LlamaConfig:
    return llama(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=num_key_value_heads,
        head_dim=64,
        vocab_size=49152,
    )


def limits_of(config: LlamaConfig, round_to: int | None = None) -> tuple[Space, Limits]:
    with torch.device("meta"):
        space = find_space(LlamaForCausalLM(config))
    return space, find_limits(space, config, round_to=round_to)


def published_kinds() -> list[str]:
    """The order of removals between the table's rows, each kind spread evenly over its interval."""
    kinds: list[str] = []
    rows = [(32, 8192, 2048), *(row[1:] for row in PUBLISHED)]
    for before, after in pairwise(rows):
        removals = [
            ((unit + 0.5) / (old - new), kind)
            for kind, old, new in zip(("kv", "ffn", "hidden"), before, after, strict=True)
            for unit in range(old - new)
        ]
        kinds += [kind for _, kind in sorted(removals)]
    return kinds


def test_slots_reproduce_the_published_token_counts() -> None:
    space, limits = limits_of(smollm(), round_to=1)
    pace = SlotPace(slot_steps=9, warmup_steps=500)
    planned = simulate(
        space.num_params, limits, [451_000_000], pace, space.head_dim, as_logged(published_kinds(), limits)
    )
    for tokens, heads, ffn, hidden in PUBLISHED[:-1]:
        reached = next(
            each.step
            for each in planned
            if each.shape["kv"] <= heads and each.shape["ffn"] <= ffn and each.shape["hidden"] <= hidden
        )
        assert reached * BATCH_TOKENS == pytest.approx(tokens * 1e9, rel=0.02)
    assert planned[-1].step * BATCH_TOKENS == pytest.approx(PUBLISHED[-1][0] * 1e9, rel=0.02)
    assert planned[-1].size <= 451_000_000


@pytest.mark.parametrize(
    "pace",
    [LinearPace(30, 3), SlotPace(0.1, 2), SlotPace(0.25, 2, equal=True), SlotPace(1.5, 1, equal=True)],
    ids=["linear", "slots", "several a step", "waits"],
)
def test_the_simulation_is_the_run(pace: LinearPace | SlotPace) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    source = sum(param.numel() for param in model.parameters())
    targets = [int(0.75 * source), int(0.85 * source)]
    pruner = Pruner(model, optimizer, targets[0], pace=pace, save_at=targets[1:])
    space, limits = pruner.space, pruner.limits
    while not pruner.done:
        tokens = torch.randint(0, 130, (2, 12))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    kinds = [removal.kind for removal in pruner.removals]
    planned = simulate(space.num_params, limits, targets, pace, space.head_dim, as_logged(kinds, limits))
    assert [(each.step, each.kind, each.size) for each in planned] == [
        (each.step, each.kind, each.params_after) for each in pruner.removals
    ]


def test_proportional_order_keeps_the_source_s_proportions() -> None:
    space, limits = limits_of(smollm(), round_to=1)
    planned = simulate(
        space.num_params, limits, [600_000_000], LinearPace(8000, 500), space.head_dim, proportional(limits)
    )
    shares = [planned[-1].shape[kind] / limits.source[kind] for kind in ("hidden", "ffn", "kv")]
    assert max(shares) - min(shares) < 0.04  # a head is 1/32
    assert pruning_steps(space.num_params, limits, 1_711_376_384, SlotPace(9), space.head_dim) == 0


def test_spans_cover_every_step() -> None:
    space, limits = limits_of(llama())
    planned = simulate(space.num_params, limits, [50_000], SlotPace(0.25, 2), space.head_dim, proportional(limits))
    covered = spans(planned, limits.source, 1000)
    assert sum(length for _, length in covered) == 1000
    assert covered[0] == (limits.source, planned[0].step)
    assert covered[-1] == (planned[-1].shape, 1000 - planned[-1].step)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_what_torch_counts(tied: bool) -> None:
    config = llama(hidden_size=192, intermediate_size=320)
    config.tie_word_embeddings = tied
    config._attn_implementation = (
        "eager"  # whose products torch counts, over all pairs of tokens instead of half of them
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, 130, (2, 32))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    space = find_space(model)
    expected = space.flops_per_token(space.shape, 2 * 32) * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    with counter, torch.no_grad():
        model(input_ids=tokens)
    assert counter.get_total_flops() == pytest.approx(pass_flops(space, 2 * 32) * tokens.numel(), rel=0.01)


def test_weights_and_moments_are_exact() -> None:
    model = LlamaForCausalLM(llama())
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 130, (2, 12))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    space = find_space(model)
    memory = memory_of(space, space.shape, micro_batch_size=2, seq_len=12)
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert memory.weights == sum(param.nbytes for param in model.parameters())
    assert memory.gradients == sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
    assert memory.moments == sum(moment.nbytes for moment in moments)


def saved_bytes(config: LlamaConfig, tokens: torch.Tensor) -> int:
    """Bytes of the distinct storages that a forward pass saves for the backward pass, weights left out."""
    model = LlamaForCausalLM(config)
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in weights)


def test_activations_are_what_a_forward_pass_saves() -> None:
    tokens = torch.randint(0, 130, (2, 16))
    shallow, deep = llama(num_hidden_layers=2), llama(num_hidden_layers=4)
    space = limits_of(deep)[0], limits_of(shallow)[0]
    estimates = [memory_of(each, each.shape, micro_batch_size=2, seq_len=16).activations for each in space]
    measured = saved_bytes(deep, tokens) - saved_bytes(shallow, tokens)
    assert estimates[0] - estimates[1] == pytest.approx(measured, rel=0.05)


def test_second_order_memory_is_bounded_by_the_row_cap_and_the_widest_input() -> None:
    space, _ = limits_of(smollm())
    ways = [
        memory_of(space, space.shape, micro_batch_size=1, seq_len=2048, batch_rows=rows, compensate=True)
        for rows in (8, 512)
    ]
    assert ways[0].solve <= ways[1].solve
    rows_of_down = 2 * 8192  # twice the in-channels, above the cap of 8192
    assert ways[1].samples == 4 * 24 * (8192 * 3 * 2048 + rows_of_down * 8192)
    assert ways[1].solve >= 4 * 2 * 8192**2
    assert memory_of(space, space.shape, micro_batch_size=1, seq_len=2048).second_order == 0


def test_the_micro_batch_fits_and_divides() -> None:
    space, _ = limits_of(smollm())

    def fitting(memory_bytes: float, device: str = "cuda") -> int:
        return fitting_micro_batch(
            space, space.shape, PassSetup(seq_len=2048, device=device), rows=512, memory_bytes=memory_bytes
        )

    size = fitting(80e9)
    assert size > 1 and 512 % size == 0
    assert memory_of(space, space.shape, micro_batch_size=size, seq_len=2048, device="cuda").peak <= 0.8 * 80e9
    assert memory_of(space, space.shape, micro_batch_size=2 * size, seq_len=2048, device="cuda").peak > 0.8 * 80e9
    assert fitting(1e15) == 512
    assert fitting(1e15, "cpu") == 8  # 16,384 tokens
    assert fitting(1e9) == 1
    assert divisors(12) == {1, 2, 3, 4, 6, 12}


@pytest.mark.parametrize("pace", [{"prune_tokens": 40_960}, {"slot_steps": 0.5}])
def test_the_orders_bound_the_assumed_one(pace: dict[str, float]) -> None:
    config = RunConfig(target_params=40_000, tokens=819_200, seq_len=64, batch_tokens=1024, **pace)  # type: ignore[arg-type]
    space, limits = limits_of(llama())
    plan = make_plan(config, space, limits, make_recipe(config, space, limits))
    assert plan.lowest < plan.flops < plan.highest
    assert plan.flops < plan.masked < plan.unpruned
    assert plan.unpruned == plan.steps * 1024 * space.flops_per_token(space.shape, 64)
    assert 40_000 >= plan.planned[-1].size > 40_000 - 3 * 3 * space.shape["hidden"]


def test_plan_reads_nothing_but_the_config(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model, run = tmp_path / "model", tmp_path / "run"
    llama().save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    run.mkdir()
    (run / "removals.jsonl").write_text("".join(json.dumps({"kind": "ffn"}) + "\n" for _ in range(20)))
    settings = RunConfig(
        model=str(model),
        target_params=40_000,
        save_at=(45_000,),
        prune_tokens=81_920,
        tokens=163_840,
        seq_len=64,
        batch_tokens=1024,
        compensate=True,
    )
    assert print_plan(settings) == 0
    printed = capsys.readouterr().out
    for word in ("assumed", "saved", "removals", "FLOPs", "memory", "second-order update", "160 steps"):
        assert word in printed
    table = [line for line in printed.splitlines() if str(model) not in line]
    assert max(len(line.rstrip()) for line in table if "lr" not in line) <= 110
    assert print_plan(settings, like=str(run)) == 0
    printed = capsys.readouterr().out
    assert f"as in {run}" in printed and "assumed" not in printed and "teacher" not in printed
    # the source for a teacher: a third of its own step, and as much of the smaller model's
    assert print_plan(replace(settings, distill="source")) == 0
    printed = capsys.readouterr().out
    at_source, at_end = map(float, re.findall(r"(\d\.\d\d) (?:of a step at the source|at the end)", printed))
    assert at_source == 0.33 and 0.4 < at_end < 0.8 and " teacher\n" in printed


def test_a_log_that_cannot_be_followed(tmp_path) -> None:
    with pytest.raises(ConfigError, match="name a run folder"):
        read_kinds(str(tmp_path))
    for line in ('{"kind": "ffn"', '{"step": 3}', '{"kind": "layer"}', "[]"):
        (tmp_path / "removals.jsonl").write_text(line + "\n")
        with pytest.raises(ConfigError, match="line 1"):
            read_kinds(str(tmp_path))
