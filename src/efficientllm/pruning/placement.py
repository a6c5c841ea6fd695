"""Placement: where the entries of a model's tensors are. Here they are whole, in the one process that trains.

What spreads them over ranks is a Placement of its own (distributed/parallel.py); pruning/ knows of ranks nothing else.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from efficientllm.pruning.removal import compact_
from efficientllm.pruning.saliency import Retired
from efficientllm.pruning.selection import Removal
from efficientllm.space.dims import Space


class Placement:
    """One process that holds everything: every call is the identity.

    Attributes:
        rank, num_ranks: of the processes that share the data; each has gradients of all of it.
        compiles: whether graphs are compiled, which hooks that come and go between compactions would break.
    """

    rank = 0
    num_ranks = 1
    compiles = False

    @property
    def has_all_rows(self) -> bool:
        """Whether the activations of all the data pass through this process."""
        return self.num_ranks == 1

    def local(self, tensor: Tensor) -> Tensor:
        """Returns the part of a parameter, gradient or moment that is held here, sharing its memory."""
        return tensor

    def first_row(self, tensor: Tensor) -> int:
        """Returns which entry of axis 0 the local part begins with."""
        return 0

    def sum_shards(self, parts: list[Tensor]) -> list[Tensor]:
        """Returns every tensor summed over the ranks that hold one copy's shards, in one collective."""
        return parts

    def sum_to(self, tensor: Tensor, rank: int) -> Tensor:
        """Returns a tensor summed over all ranks; only `rank` may use it."""
        return tensor

    def from_rank(self, tensor: Tensor, rank: int) -> Tensor:
        """Returns the tensor that `rank` holds, to all; the others give one of the same shape."""
        return tensor

    def check_same(self, removals: Sequence[Removal]) -> None:
        """Raises TrainingError if the ranks have chosen differently."""

    def compact(self, model: nn.Module, optimizer: Optimizer, space: Space, units: Retired) -> nn.Module:
        """Drops retired units, moments included, and returns the model: another one where shapes are set for good."""
        compact_(model, optimizer, space, units)
        return model
