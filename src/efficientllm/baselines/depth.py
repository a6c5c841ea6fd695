"""Whole layers that go before the first step, those of least block influence (docs/methods.md)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficientllm.baselines.shapes import LAYER_LISTS, with_layers
from efficientllm.distributed.engine import Engine
from efficientllm.pruning import Removal


def remove_layers_(
    model: Any, whole: Any, batches: Sequence[Tensor], num_layers: int, micro_batch_size: int, engine: Engine
) -> list[Removal]:
    """Removes the layers of least block influence from a model, in place, until `num_layers` are left; returns the log.

    Args:
        whole: what `engine.wrap` has made of the model's twin, only to be read.
    """
    influences = block_influences(whole, batches, micro_batch_size, engine)
    params = sum(param.numel() for param in model.parameters())
    removals = []
    for layer in least_influential(influences, len(influences) - num_layers):
        left = params - sum(param.numel() for param in model.model.layers[layer].parameters())
        removals.append(Removal(0, "layer", {"layers": layer}, {"layer": influences[layer]}, params, left))
        params = left
    drop_layers_(model, [removal.units["layers"] for removal in removals])
    return removals


@torch.no_grad()
def block_influences(model: Any, batches: Sequence[Tensor], micro_batch_size: int, engine: Engine) -> list[float]:
    """Returns 1 - E[cos(x, y)] of every layer, x a token entering it and y the token leaving it (Minitron).

    Args:
        batches: this rank's, token ids (rows, seq_len); the expectation runs over those of all ranks.
    """
    sums = [torch.zeros((), dtype=torch.float64, device=engine.device) for _ in model.model.layers]

    def look(total: Tensor) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            total.add_(torch.cosine_similarity(args[0].float(), y.float(), dim=-1).double().sum())

        return hook

    hooks = [layer.register_forward_hook(look(total)) for layer, total in zip(model.model.layers, sums, strict=True)]
    tokens = 0
    try:
        with torch.compiler.set_stance("force_eager"):
            for batch in batches:
                for rows in torch.split(batch, micro_batch_size):
                    with engine.autocast():
                        model(input_ids=rows, labels=rows, use_cache=False)
                tokens += batch.numel()
    finally:
        for hook in hooks:
            hook.remove()
    return [1 - float(engine.all_reduce_mean(total / tokens)) for total in sums]


def least_influential(influences: Sequence[float], count: int) -> list[int]:
    """Returns the `count` layers of least influence, the least first; of equal ones the earlier."""
    return sorted(range(len(influences)), key=lambda layer: (influences[layer], layer))[:count]


def drop_layers_(model: Any, gone: Sequence[int]) -> None:
    """Takes layers out of a model, in place; the others are renumbered."""
    stay = [layer for layer in range(len(model.model.layers)) if layer not in gone]
    changed = with_layers(model.config, stay)
    for name in ("num_hidden_layers", *LAYER_LISTS):
        if hasattr(changed, name):
            setattr(model.config, name, getattr(changed, name))  # in place: every module holds this object
    model.model.layers = nn.ModuleList([model.model.layers[layer] for layer in stay])
    for index, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
