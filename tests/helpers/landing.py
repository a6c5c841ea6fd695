"""Removals by simulation, without a model: whatever is drawn, every target is landed on."""

import random
from typing import Any

import torch

from efficientllm.pruning.landing import ffn_tile_size, is_landed
from efficientllm.pruning.selection import Queue, choose_kind
from efficientllm.space import Limits, Polynomial, Space, find_space
from efficientllm.space.dims import Shape
from helpers.families import meta_model


def space_of(config: Any) -> Space:
    return find_space(meta_model(config))


def random_queues(limits: Limits, draw: random.Random) -> dict[str, Queue]:
    """Queues of random saliencies, each kind at a scale of its own, so that often one is exhausted first."""
    queues = {}
    for kind, size in limits.source.items():
        scale = 10 ** draw.uniform(-3, 3)
        queues[kind] = Queue(torch.tensor([[scale * draw.random() for _ in range(size)]]))
    return queues


def land(limits: Limits, num_params: Polynomial, targets: list[int], queues: dict[str, Queue]) -> list[Shape]:
    """Removes group after group, as Pruner does, and returns the shape at every landing."""
    shape, left, landed = dict(limits.source), list(targets), []
    for _ in range(sum(shape.values()) + 1):
        while left and is_landed(shape, limits, num_params, left[0]):
            left.pop(0)
            landed.append(dict(shape))
        if not left:
            return landed
        kind = choose_kind(queues, shape, limits, num_params, left)
        assert kind is not None, f"stuck at {shape} on the way to {left[0]}"
        queues[kind].pop()
        shape[kind] -= 1
        assert shape[kind] >= limits.floor[kind] >= 1, "a layer was emptied"
    raise AssertionError("never landed")


def assert_lands(space: Space, limits: Limits, targets: list[int], draw: random.Random) -> None:
    for shape, target in zip(
        land(limits, space.num_params, targets, random_queues(limits, draw)), targets, strict=True
    ):
        params = space.num_params(shape)
        # a kind that was never touched keeps the source's size, a multiple of the tile or not
        assert all(size == limits.source[kind] or size % limits.tile[kind] == 0 for kind, size in shape.items())
        assert target - ffn_tile_size(shape, limits, space.num_params) < params <= target, (shape, params, target)
