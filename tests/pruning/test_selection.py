"""The landing rule and the order of removals, by simulation, without a model."""

import random

import pytest
import torch
from transformers import AutoConfig

from efficientllm.pruning.landing import can_land, ffn_tile_size, is_landed, may_remove
from efficientllm.pruning.schedule import LinearPace, SlotPace
from efficientllm.pruning.selection import LOOK, Queue, Removal, choose_kind, least, o_columns
from efficientllm.space import Limits, Space, find_limits
from efficientllm.space.dims import Shape
from helpers.families import NAMES, make_config
from helpers.landing import assert_lands, random_queues, space_of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_lands_on_random_targets_of_every_family(name: str, round_to: int) -> None:
    draw = random.Random(f"{name}{round_to}")
    landed = 0
    for heads in ("grouped", "multihead"):
        config = make_config(name, heads, intermediate_size=52, hidden_size=48)
        space = space_of(config)
        limits = find_limits(space, config, round_to=round_to, min_ffn=4, min_hidden=8)
        most, least = space.num_params(limits.source), space.num_params(limits.floor)
        for _ in range(25):
            targets = sorted((draw.randint(least, most - 1) for _ in range(draw.choice((1, 1, 2, 3)))), reverse=True)
            if can_land(limits.source, limits, space.num_params, *targets):
                assert_lands(space, limits, targets, draw)
                landed += len(targets)
    assert landed > 40


@pytest.mark.parametrize("round_to", [1, 64, 128])
@pytest.mark.parametrize("target", [70_000_000, 100_000_000, 120_000_000, 51_234_567])
def test_lands_on_real_sizes(round_to: int, target: int) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    space = space_of(config)
    limits = find_limits(space, config, round_to=round_to)
    assert space.num_params(limits.source) == 134_515_008
    for seed in range(2):
        assert_lands(space, limits, [target], random.Random(seed))


def test_without_the_rule_a_run_misses_its_target() -> None:
    """Negative control: the least salient kind every time, closing tiles at the end, ends outside the window."""
    config = make_config("llama", hidden_size=48, intermediate_size=52)
    space = space_of(config)
    limits = find_limits(space, config, round_to=8, min_ffn=4, min_hidden=8)
    most, least = space.num_params(limits.source), space.num_params(limits.floor)
    draw, missed = random.Random(0), 0
    for _ in range(100):
        target, shape, queues = draw.randint(least, most), dict(limits.source), random_queues(limits, draw)
        while space.num_params(limits.close(shape)) > target:
            kinds = [kind for kind in shape if shape[kind] > limits.floor[kind]]
            kind = min(kinds, key=lambda kind: (queues[kind].head, kind))
            queues[kind].pop()
            shape[kind] -= 1
        closed = limits.close(shape)
        missed += space.num_params(closed) <= target - ffn_tile_size(closed, limits, space.num_params)
    assert missed > 20


def lands(space: Space, limits: Limits, shape: Shape, target: int) -> bool:
    return target - ffn_tile_size(shape, limits, space.num_params) < space.num_params(shape) <= target


@pytest.mark.parametrize("seed", range(3))
def test_can_land_is_the_exhaustive_search(seed: int) -> None:
    draw = random.Random(seed)
    config = make_config("mistral", hidden_size=32, intermediate_size=36)
    space = space_of(config)
    limits = find_limits(space, config, round_to=4, min_ffn=4, min_hidden=4)
    source = limits.source
    shapes = [
        {"hidden": hidden, "ffn": ffn, "kv": kv, "query": query}
        for hidden in limits.legal_sizes("hidden", source["hidden"])
        for ffn in limits.legal_sizes("ffn", source["ffn"])
        for kv in limits.legal_sizes("kv", source["kv"])
        for query in limits.legal_sizes("query", source["query"])
    ]
    answers = set()
    for _ in range(60):
        start, target = draw.choice(shapes), draw.randint(0, space.num_params(source))
        below = [shape for shape in shapes if all(shape[kind] <= start[kind] for kind in start)]
        expected = any(lands(space, limits, shape, target) for shape in below)
        assert can_land(start, limits, space.num_params, target) == expected
        answers.add(expected)
        lower = target - draw.randint(1, 2000)
        landings = [shape for shape in below if lands(space, limits, shape, target)]
        chain = any(
            all(shape[kind] <= first[kind] for kind in shape) and lands(space, limits, shape, lower)
            for first in landings
            for shape in below
        )
        assert can_land(start, limits, space.num_params, target, lower) == chain
    assert answers == {True, False}


def test_ties_go_by_name() -> None:
    config = make_config("llama")
    space = space_of(config)
    limits = find_limits(space, config)
    target = space.num_params(limits.floor)

    def equal(saliency: float, **others: float) -> dict[str, Queue]:
        return {k: Queue(torch.full((1, n), others.get(k, saliency))) for k, n in limits.source.items()}

    def first(queues: dict[str, Queue]) -> str | None:
        return choose_kind(queues, limits.source, limits, space.num_params, [target])

    assert first(equal(1.0)) == "ffn"
    assert first(dict(reversed(equal(1.0).items()))) == "ffn"
    assert first(equal(1.0, query=0.5, hidden=0.5)) == "hidden"
    assert first(equal(1.0, query=0.25, hidden=0.5)) == "query"
    scores = torch.tensor([[2.0, 1.0, 1.0, 3.0]])
    assert Queue(scores).pop() == [1] and Queue(scores.flip(1)).pop() == [1]


@pytest.mark.parametrize("count", [1, 7, 40])
def test_the_least_are_those_that_a_stable_sort_begins_with(count: int) -> None:
    for scores in (torch.randn(50, 40), torch.randint(-3, 4, (50, 40)) * torch.tensor([0.0, 1.0]).repeat(20)):
        scores[:, 3] = torch.inf
        assert torch.equal(least(scores, count), scores.sort(dim=1, stable=True).indices[:, :count])


def test_a_queue_goes_on_past_what_it_has_looked_up() -> None:
    scores = torch.randint(0, 9, (3, 2 * LOOK + 5)).float()
    values, units = scores.sort(dim=1, stable=True)
    queue = Queue(scores)
    for value, chosen in zip(values.double().mean(0).tolist(), units.T.tolist(), strict=True):
        assert queue.head == value and queue.pop() == chosen
    assert queue.head == float("inf")


def test_a_kind_at_its_floor_and_an_overshoot_are_passed_over() -> None:
    config = make_config("llama")
    space = space_of(config)
    limits = find_limits(space, config)
    num_params, source = space.num_params, limits.source
    assert not may_remove("ffn", {**source, "ffn": limits.floor["ffn"]}, limits, num_params, [1])
    target = num_params(source) - ffn_tile_size(source, limits, num_params)  # exactly one channel
    assert may_remove("ffn", source, limits, num_params, [target])
    assert not may_remove("kv", source, limits, num_params, [target]), "a KV group overshoots by more than a channel"
    queues = random_queues(limits, random.Random(0))
    queues["kv"].saliencies = [0.0] * source["kv"]
    assert choose_kind(queues, source, limits, num_params, [target]) == "ffn"


def test_open_tiles_are_completed_at_the_end() -> None:
    config = make_config("llama", hidden_size=48, intermediate_size=64)
    space = space_of(config)
    limits = find_limits(space, config, round_to=16, min_ffn=16, min_hidden=16)
    shape = {**limits.source, "ffn": 60}
    target = space.num_params(limits.close(shape))
    assert [kind for kind in shape if may_remove(kind, shape, limits, space.num_params, [target])] == ["ffn"]
    assert not is_landed(shape, limits, space.num_params, target)
    assert is_landed(limits.close(shape), limits, space.num_params, target)


def test_slots_are_the_papers() -> None:
    shape = {"hidden": 100, "ffn": 100, "kv": 5, "query": 3}
    costs = {kind: o_columns(kind, shape, 64) for kind in shape}
    assert costs == {"ffn": 1, "hidden": 2, "kv": 3 * 64, "query": 5 * 64}


def test_removals_are_plain_rows() -> None:
    removal = Removal(3, "ffn", {"layers.0.ffn": 7}, {"ffn": 0.5}, 100, 90)
    assert removal.as_row() == {
        "step": 3, "kind": "ffn", "units": {"layers.0.ffn": 7}, "saliencies": {"ffn": 0.5},
        "params_before": 100, "params_after": 90,
    }  # fmt: skip


# --- schedule -------------------------------------------------------------------------------------------------------


def test_linear_pace_follows_its_line() -> None:
    pace = LinearPace(steps=110, warmup_steps=10)
    assert not pace.is_due(10, 0, 1000, 1000, 500) and pace.is_due(11, 0, 1000, 1000, 500)
    params, seen = 1000, {}
    for step in range(1, 120):
        while params > 500 and pace.is_due(step, 0, params, 1000, 500):
            params -= 7
        seen[step] = params
    for step in range(11, 111):
        line = 1000 - 500 * (step - 10) / 100
        assert line - 7 < seen[step] <= line
    assert pace.is_due(110, 0, 1, 1000, 500), "at its end everything is due"


@pytest.mark.parametrize("slot_steps", [9, 1, 0.25])
def test_slot_pace_waits_in_proportion(slot_steps: float) -> None:
    for equal in (False, True):
        pace, next_step, due, slots = SlotPace(slot_steps, 5, equal), 0.0, [], [1, 2, 64, 1, 1, 2]
        for step in range(1, 2000):
            while len(due) < len(slots) and pace.is_due(step, next_step, 0, 0, 0):
                next_step = pace.wait(next_step, step, slots[len(due)])
                due.append(step)
        waited = [0.0]
        for cost in slots[:-1]:
            waited.append(waited[-1] + slot_steps * (1 if equal else cost))
        assert due == [int(6 + wait) for wait in waited]
