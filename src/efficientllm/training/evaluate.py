"""The loss on held-out rows."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn


@torch.no_grad()
def validation_loss(model: nn.Module, rows: Sequence[NDArray[Any]], micro_batch_size: int, autocast: Any) -> float:
    """Returns the mean loss per token, in nats, over rows of equal length (each token but a row's first)."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(rows), micro_batch_size):
        batch = torch.stack(
            [torch.from_numpy(rows[row]) for row in range(start, min(start + micro_batch_size, len(rows)))]
        )
        batch = batch.to(device)
        with autocast():
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        total += float(loss) * len(batch)
    model.train(was_training)
    return total / len(rows)
