"""Units that go before the first step, by a saliency over calibration batches (docs/methods.md)."""

from collections.abc import Callable
from functools import partial
from math import ceil

import torch

from efficientllm.baselines.obs import Fluctuation, layerwise_scores, obs_scores
from efficientllm.config.methods import METHODS
from efficientllm.config.run_config import RunConfig
from efficientllm.errors import TrainingError
from efficientllm.pruning.activations import InputSampler
from efficientllm.pruning.saliency import Scores
from efficientllm.pruning.selection import Order
from efficientllm.pruning.trajectory import even, toward
from efficientllm.space.dims import Space
from efficientllm.space.limits import Limits
from efficientllm.training.size_target import Budget
from efficientllm.training.trainer import Trainer

Show = Callable[[int, int], None]  # calibration batches done, and their total


def remove_one_shot(trainer: Trainer, budget: Budget, show: Show) -> None:
    """Removes everything that is to go from a model that has not trained yet, by its next batches.

    Raises:
        TrainingError: if a calibration batch has no finite gradient.
    """
    rounds = METHODS[trainer.config.method].rounds
    order = removal_order(trainer.config, trainer.pruner.limits, budget)
    batches = ceil(num_batches(trainer.config) / rounds)
    for number in range(rounds):
        scores = unit_scores(trainer, batches, partial(_show, show, number * batches, rounds * batches))
        trainer.pruner.remove(scores, number + 1, order)


def _show(show: Show, before: int, total: int, count: int) -> None:
    show(before + count, total)


def removal_order(config: RunConfig, limits: Limits, budget: Budget) -> Order | None:
    """Returns in which order kinds go: toward `--shape-of`, all in the same ratio, or (None) by saliency."""
    if budget.goal is not None:
        return toward(budget.goal)
    return None if config.allocation == "global" else even(limits)


def num_batches(config: RunConfig) -> int:
    """Returns the optimizer's batches that hold `--calibration-tokens`."""
    return ceil(config.calibration_tokens / config.batch_tokens)


def unit_scores(trainer: Trainer, batches: int, seen: Callable[[int], None]) -> Scores:
    """Returns the saliency of every unit by the run's method, over the trainer's next batches if it uses any."""
    pruner, method = trainer.pruner, trainer.config.method
    if method == "random":
        return random_scores(pruner.space, trainer.config.seed)
    if method == "magnitude":
        return _whole(pruner.scorer.now(pruner.model, lambda param: param))
    sampler = InputSampler(trainer.model, pruner.space) if method == "activation" else None
    fluctuation = Fluctuation()
    total: Scores = {}
    for number in range(1, batches + 1):
        with trainer.gradients():
            if sampler:
                fluctuation.add(sampler)
                sampler.clear()
            elif method == "one-shot":
                scores = _whole(pruner.scorer.now(pruner.model))
                total = {kind: total.get(kind, torch.zeros(())) + score / batches for kind, score in scores.items()}
        seen(number)
    if sampler:
        sampler.close()
        engine = trainer.engine
        return layerwise_scores(pruner, lambda reader: fluctuation.variance(reader, engine))
    return total or obs_scores(pruner)


def random_scores(space: Space, seed: int) -> Scores:
    """Returns scores that are drawn evenly, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: torch.rand(len(bundle.dims), bundle.size, generator=generator) for kind, bundle in space.bundles.items()
    }


def _whole(scores: Scores | None) -> Scores:
    if scores is None:
        raise TrainingError(
            "the gradient of a calibration batch is not finite; check the source's weights and the data"
        )
    return scores
