"""The loop that everybody writes, around a Pruner, on a toy language."""

from typing import Any

import torch
from torch import Tensor, nn

from efficientllm import Pruner
from efficientllm.pruning import LinearPace
from efficientllm.pruning.landing import ffn_tile_size
from efficientllm.space import find_limits, find_space
from helpers.families import VOCAB, loss_of, meta_model, numel


def text(step: int, rows: int = 4, length: int = 16) -> Tensor:
    """A toy language that can be learnt: the next token is 5 times this one plus 1."""
    tokens = torch.randint(0, VOCAB, (rows, 1), generator=torch.Generator().manual_seed(step))
    while tokens.shape[1] < length:
        tokens = torch.cat([tokens, (tokens[:, -1:] * 5 + 1) % VOCAB], dim=1)
    return tokens


def adamw(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **{"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), **settings})


def target_of(model: Any, share: float = 0.5) -> int:
    """A target between the floors and the source."""
    space = find_space(model)
    limits = limits_of(model)
    most, least = space.num_params(limits.source), space.num_params(limits.floor)
    return int(least + share * (most - least))


def limits_of(model: Any, **flags: Any) -> Any:
    return find_limits(find_space(model), model.config, **{"min_ffn": 8, "min_hidden": 8, **flags})


def prune(model: Any, optimizer: Any = None, target: int | None = None, **settings: Any) -> Pruner:
    settings = {"pace": LinearPace(20, 2), "limits": limits_of(model), **settings}
    return Pruner(model, optimizer or adamw(model), target or target_of(model), **settings)


def loop(pruner: Pruner, steps: int, start: int = 0, clip: bool = True) -> list[float]:
    """The loop that everybody writes."""
    losses = []
    for step in range(start, start + steps):
        pruner.optimizer.zero_grad()
        loss = loss_of(pruner.model, text(step))
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(pruner.model.parameters(), 1.0)
        pruner.optimizer.step()
        losses.append(loss.item())
    return losses


def assert_landed(pruner: Pruner, target: int) -> None:
    params = numel(pruner.model)
    tile = ffn_tile_size(pruner.shape, pruner.limits, pruner.space.num_params)
    assert pruner.done and params == pruner.num_params and target - tile < params <= target
    assert numel(meta_model(pruner.model.config)) == params
    assert not pruner.state_dict()["retired"]


def assert_same_models(one: Any, other: Any, atol: float = 0.0) -> None:
    for (key, param), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert param.shape == expected.shape, key
        torch.testing.assert_close(param.data, expected.data, rtol=0, atol=atol, msg=key)


def rows(pruner: Pruner) -> list[tuple[int, str, dict[str, int]]]:
    return [(removal.step, removal.kind, removal.units) for removal in pruner.removals]
