"""Saliency against finite differences, plain loops and its own compactions."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from efficientllm.pruning import saliency as module
from efficientllm.pruning.norms import LiveNorms
from efficientllm.pruning.removal import compact_, count_live_, retire_
from efficientllm.pruning.saliency import Scores, first_order, score_units, second_order, smooth, sum_units
from efficientllm.pruning.selection import Queue
from efficientllm.space import Space, find_space
from helpers.families import EVERY, FFN, HEAD_DIM, HIDDEN, LAYERS, VOCAB, batch, loss_of, make_model


def trained(name: str = "llama", heads: str = "grouped") -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Returns a model, its weights and its gradients."""
    model = make_model(name, heads)
    loss_of(model, batch()).backward()
    params = dict(model.named_parameters())
    return model, {key: p.data for key, p in params.items()}, {key: p.grad for key, p in params.items()}


def scores_of(model: Any, space: Space | None = None, **settings: Any) -> Scores:
    params, space = dict(model.named_parameters()), space or find_space(model)
    sums = sum_units(space, params, {key: p.grad for key, p in params.items()}, **settings)
    scores = score_units(space, sums, settings.get("retired"))
    assert scores is not None
    return scores


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("key", ["model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight"])
def test_first_order_is_the_change_of_the_loss(key: str) -> None:
    """|g·w| of an element is |dL/dε| of w·(1-ε), by central differences; so is its sum over a scaled column."""
    model, weights, grads = trained()
    weight, expected = weights[key], first_order(weights[key], grads[key])
    whole = weight.clone()
    epsilon = 1e-5

    def slope(mask: Tensor) -> float:
        losses = []
        for sign in (1, -1):
            weight.copy_(whole * (1 - sign * epsilon * mask))
            with torch.no_grad():
                losses.append(float(loss_of(model, batch())))
        weight.copy_(whole)
        return (losses[0] - losses[1]) / (2 * epsilon)

    draw = random.Random(0)
    for _ in range(5):
        row = draw.choice(batch().unique().tolist()) if "embed" in key else draw.randrange(HIDDEN)
        at = (row, draw.randrange(HIDDEN))
        mask = torch.zeros_like(weight)
        mask[at] = 1
        assert abs(slope(mask)) == pytest.approx(float(expected[at]), rel=1e-5, abs=1e-9)
    assert abs(slope(torch.ones_like(weight))) == pytest.approx(abs(float((weight * grads[key]).sum())), rel=1e-5)


def test_fisher_is_the_second_order_change() -> None:
    weight, grad = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    fisher = torch.rand(5, 4, dtype=torch.float64)
    # L(w) - L(0) of the parabola with slope g and curvature F at w
    torch.testing.assert_close(second_order(weight, grad, fisher), (grad * weight - fisher * weight**2 / 2).abs())
    torch.testing.assert_close(second_order(weight, grad), second_order(weight, grad, grad**2))
    assert not torch.allclose(second_order(weight, grad), first_order(weight, grad))


def plain_scores(model: Any, scored: str, element: Any = lambda w, g: (w * g).abs()) -> dict[str, list[float]]:
    """Mean element saliency of every unit of a bias-free Llama, by the words of docs/method.md, one unit at a time."""
    layers, embed = model.model.layers, model.model.embed_tokens
    e = {key: element(p.data, p.grad) for key, p in model.named_parameters()}
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    everything = scored == "all"
    result: dict[str, list[float]] = {}

    def mean(tensors: list[Tensor]) -> float:
        return float(torch.cat([each.flatten() for each in tensors]).mean())

    hidden = []
    for u in range(embed.weight.shape[1]):
        parts = [e["model.embed_tokens.weight"][:, u]]
        if everything and "lm_head.weight" in e:
            parts.append(e["lm_head.weight"][:, u])
        for number in range(len(layers)):
            at = f"model.layers.{number}."
            parts += [e[at + "self_attn.o_proj.weight"][u], e[at + "mlp.down_proj.weight"][u]]
            if everything:
                parts += [e[at + f"self_attn.{x}_proj.weight"][:, u] for x in "qkv"]
                parts += [e[at + f"mlp.{x}_proj.weight"][:, u] for x in ("gate", "up")]
        hidden.append(mean(parts))
    result["hidden"] = hidden
    for number in range(len(layers)):
        at = f"model.layers.{number}."
        down, gate, up = (e[at + f"mlp.{x}_proj.weight"] for x in ("down", "gate", "up"))
        q, k, v, o = (e[at + f"self_attn.{x}_proj.weight"] for x in "qkvo")
        result[f"layers.{number}.ffn"] = [
            mean([down[:, u], gate[u], up[u]] if everything else [down[:, u]]) for u in range(down.shape[1])
        ]
        kv = []
        for u in range(k.shape[0] // HEAD_DIM):
            rows, wide = (
                slice(u * HEAD_DIM, (u + 1) * HEAD_DIM),
                slice(u * group * HEAD_DIM, (u + 1) * group * HEAD_DIM),
            )
            kv.append(mean([o[:, wide], q[wide], k[rows], v[rows]] if everything else [o[:, wide]]))
            queries = []
            for h in range(group):
                head = slice((u * group + h) * HEAD_DIM, (u * group + h + 1) * HEAD_DIM)
                queries.append(mean([o[:, head], q[head]] if everything else [o[:, head]]))
            result[f"layers.{number}.query.{u}"] = queries
        result[f"layers.{number}.kv"] = kv
    return result


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("scored", ["output", "all"])
def test_unit_scores_are_means_over_their_elements(name: str, scored: str) -> None:
    model, _, _ = trained(name)
    space, found, expected = find_space(model), scores_of(model, scored=scored), plain_scores(model, scored)
    for kind, bundle in space.bundles.items():
        for row, dim in enumerate(bundle.dims):
            assert found[kind][row].tolist() == pytest.approx(expected[dim.name], rel=1e-9), dim.name
    other = scores_of(model, scored="all" if scored == "output" else "output")
    assert all(not torch.allclose(found[kind], other[kind]) for kind in found)  # control
    fisher = plain_scores(model, scored, second_order)
    found = scores_of(model, scored=scored, saliency="taylor2")
    assert found["ffn"][0].tolist() == pytest.approx(fisher["layers.0.ffn"], rel=1e-9)


def test_given_fishers_are_used() -> None:
    model, weights, grads = trained()
    squares = {key: grad**2 for key, grad in grads.items()}
    own, given = scores_of(model, saliency="taylor2"), scores_of(model, saliency="taylor2", fishers=squares)
    more = scores_of(model, saliency="taylor2", fishers={key: 1e6 * square for key, square in squares.items()})
    for kind in own:
        torch.testing.assert_close(own[kind], given[kind])
        assert (more[kind] > own[kind]).all()
    assert set(weights) == set(squares)


@pytest.mark.parametrize("scored", ["output", "all"])
def test_chunks_have_no_effect(monkeypatch: pytest.MonkeyPatch, scored: str) -> None:
    model, _, _ = trained("llama-bias")
    whole = scores_of(model, scored=scored)
    for chunk in (1, 100, 1000):
        monkeypatch.setattr(module, "CHUNK", chunk)
        for kind, score in scores_of(model, scored=scored).items():
            torch.testing.assert_close(score, whole[kind], rtol=1e-12, atol=0)


def test_missing_gradients_score_zero() -> None:
    model, _, _ = trained()
    model.model.layers[0].mlp.down_proj.weight.grad = None
    scores = scores_of(model)
    assert not scores["ffn"][0].any() and scores["ffn"][1].all()


def test_broken_gradients_are_seen() -> None:
    model, _, _ = trained()
    space = find_space(model)
    gone = {"hidden": [3], **{f"layers.{n}.ffn": [n] for n in range(LAYERS)}}
    for broken in (0.5, torch.nan, torch.inf):
        model.model.layers[1].mlp.down_proj.weight.grad[2, 3] = broken
        sums = sum_units(space, params := dict(model.named_parameters()), {k: p.grad for k, p in params.items()})
        assert (score_units(space, sums, gone) is None) == (broken != 0.5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scored", ["output", "all"])
@pytest.mark.parametrize("name, heads", EVERY)
def test_scores_do_not_change_across_a_compaction(name: str, heads: str, scored: str) -> None:
    """Retired units count nowhere: what is left scores like the compacted model's, in the same order."""
    draw = random.Random(name)
    model, norms = make_model(name, heads), LiveNorms()
    space = find_space(model)
    units = {
        dim.name: draw.sample(range(dim.size), 1 if kind == "kv" else 3)
        for kind in ("hidden", "ffn", "kv")
        for dim in space.bundles[kind].dims
    }
    retire_(model, None, space, units)
    count_live_(model, norms, space, units)
    loss_of(model, batch()).backward()
    scores = scores_of(model, space, scored=scored, retired=units)
    assert all((score.isinf().sum(1) == (0 if kind == "query" else len(next(iter(units[dim.name] for dim in space.bundles[kind].dims))))).all() for kind, score in scores.items())  # noqa: E501  # fmt: skip
    naive = scores_of(model, space, scored=scored)
    compact_(model, None, space, units)
    count_live_(model, norms, find_space(model), {})
    model.zero_grad()
    loss_of(model, batch()).backward()
    after = scores_of(model, scored=scored)
    for kind, bundle in space.bundles.items():
        if kind == "query":
            live = [
                row for row, dim in enumerate(bundle.dims)
                if int(dim.name.rpartition(".")[2]) not in units[f"layers.{dim.layer}.kv"]
            ]  # fmt: skip
            left = scores[kind][live]
        else:
            left = torch.stack([row[row.isfinite()] for row in scores[kind]])
            kept = torch.stack([score[row.isfinite()] for row, score in zip(scores[kind], naive[kind], strict=True)])
            assert not torch.allclose(kept, after[kind], rtol=1e-6)  # control: a mean over dead elements is lower
        torch.testing.assert_close(left, after[kind], rtol=1e-8, atol=1e-14)


# --- moving average -------------------------------------------------------------------------------------------------


def test_smoothing_is_an_average_of_shares() -> None:
    steps = [{"a": torch.rand(2, 3).double(), "b": torch.rand(1, 4).double()} for _ in range(3)]
    average = None
    for scores in steps:
        average = smooth(average, scores, 0.9)
    shares = [
        {kind: score / sum(float(s.sum()) for s in step.values()) for kind, score in step.items()} for step in steps
    ]
    for kind in "ab":
        expected = 0.9 * (0.9 * shares[0][kind] + 0.1 * shares[1][kind]) + 0.1 * shares[2][kind]
        assert average is not None
        torch.testing.assert_close(average[kind], expected)
    clipped = None
    for factor, scores in zip((1.0, 0.01, 7.0), steps, strict=True):
        clipped = smooth(clipped, {kind: score * factor for kind, score in scores.items()}, 0.9)
    assert clipped is not None and average is not None
    torch.testing.assert_close(clipped["a"], average["a"])  # clipping by another factor each step leaves it


def test_smoothing_leaves_retired_units_out() -> None:
    scores = {"a": torch.tensor([[1.0, 3.0, torch.inf]])}
    first = smooth(None, scores, 0.5)
    assert first["a"].tolist() == [[0.25, 0.75, torch.inf]]
    later = smooth(first, {"a": torch.tensor([[torch.inf, 2.0, torch.inf]])}, 0.5)
    assert later["a"].tolist() == [[torch.inf, 0.875, torch.inf]]


# --- groups ---------------------------------------------------------------------------------------------------------


def test_a_group_is_the_mean_of_each_dims_least() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, torch.inf], [5.0, 9.0, 5.0, torch.inf]])
    queue = Queue(scores)
    assert queue.head == 3.0 and queue.pop() == [1, 0]  # a tie of 5s goes by index
    assert queue.head == 3.5 and queue.pop() == [2, 2]
    assert queue.head == 6.0 and queue.pop() == [0, 1]
    assert queue.head == float("inf")
    alone = Queue(scores, [False, True])
    assert alone.head == 5.0 and alone.pop() == [1, 0], "a dim that is not counted still gives a unit"


def test_scores_are_kept_in_float32_at_least() -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    loss_of(model, batch()).backward()
    scores = scores_of(model)
    assert {score.dtype for score in scores.values()} == {torch.float32}
    assert scores["hidden"].shape == (1, HIDDEN) and scores["ffn"].shape == (LAYERS, FFN) and VOCAB == 61
