"""The loss on held-out rows."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from efficientllm.distributed.engine import Engine


@torch.no_grad()
def validation_loss(model: nn.Module, rows: Sequence[NDArray[Any]], micro_batch_size: int, engine: Engine) -> float:
    """Returns the mean loss per token, in nats, over rows of equal length (each token but a row's first).

    The ranks take turns; one that has no rows left goes through a forward pass all the same, which shards need.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows), micro_batch_size * engine.num_ranks):
        first = start + micro_batch_size * engine.rank
        mine = range(first, min(first + micro_batch_size, len(rows)))
        batch = torch.stack([torch.from_numpy(rows[row]) for row in mine or [0]]).to(engine.device)
        with engine.autocast(), torch.compiler.set_stance("force_eager"):
            # compiling for other row counts, without gradients, would cost more than it saves
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        total += float(loss) * len(mine)
    model.train(was_training)
    return float(engine.all_reduce_mean(total.to(engine.device))) * engine.num_ranks / len(rows)
