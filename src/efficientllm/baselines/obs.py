"""Layer-wise saliencies: what the outputs of a unit's consumers lose with it, by their inputs alone.

X  (rows, in)   a consumer's inputs            W  (out, in)        its weight
H  (in, in)     XᵀX, damped; or (in,) its diagonal alone            P  the in-channels of one unit
G  (units, block, block)  the blocks (WᵀW)_PP of every unit
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from efficientllm.pruning.activations import InputSampler, consumer_inputs
from efficientllm.pruning.compensation import damped_, gram
from efficientllm.pruning.placement import Placement
from efficientllm.pruning.pruner import Pruner
from efficientllm.pruning.saliency import Scores, live_lengths
from efficientllm.space.dims import Dim, Slot


class Fluctuation:
    """Mean and variance of every distinct consumer input over the batches of a calibration (FLAP)."""

    def __init__(self) -> None:
        self.count: dict[str, int] = defaultdict(int)
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def add(self, sampler: InputSampler) -> None:
        """Takes the rows that a pass has left."""
        sampler.collect()
        for reader in sampler.readers:
            X = sampler.inputs(reader).double()
            self.count[reader] += len(X)
            self.sums[reader] = self.sums.get(reader, 0) + X.sum(0)
            self.squares[reader] = self.squares.get(reader, 0) + X.square().sum(0)

    def variance(self, reader: str, placement: Placement) -> Tensor:
        """Returns the variance (in,) of an input over the rows of all ranks."""
        device = self.sums[reader].device
        count = _everywhere(torch.tensor(float(self.count[reader]), device=device, dtype=torch.float64), placement)
        mean = _everywhere(self.sums[reader], placement) / count
        return (_everywhere(self.squares[reader], placement) / count - mean.square()).clamp(min=0)


def damped_moments(sampler: InputSampler, reader: str, placement: Placement) -> Tensor:
    """Returns H of an input from the rows that are kept of it, over all ranks."""
    return damped_(_everywhere(gram(sampler.inputs(reader)), placement))


def obs_scores(pruner: Pruner) -> Scores:
    """Returns every unit's error after the update of variant B, from the inputs kept since the last removal."""
    sampler = pruner.sampler
    assert sampler is not None
    sampler.collect()
    return layerwise_scores(pruner, partial(damped_moments, sampler, placement=pruner.placement))


@torch.no_grad()
def layerwise_scores(pruner: Pruner, moments: Callable[[str], Tensor]) -> Scores:
    """Returns every unit's share of its consumers' outputs, per weight that reads it; retired units get infinity.

    A share is the squared error that the output is left with when the unit goes, over the output's own square.
    With H whole it is structured OBS's error, what is left after the best update of the other weights (ZipLM); with
    H = diag Var(X) it is FLAP's fluctuation times squared weights. The head is no consumer here, as in the update.

    Args:
        moments: H of an input, by the name of its first reader.
    """
    model, space, retired, placement = pruner.model, pruner.space, pruner.retired, pruner.placement
    slots: dict[str, list[tuple[Dim, Slot]]] = defaultdict(list)
    for dim in space.dims():
        for slot in dim.slots:
            if slot.role == "consumer" and slot.axis == 1:
                slots[slot.param.rpartition(".")[0]].append((dim, slot))
    live = live_lengths(space, retired)
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    for readers in consumer_inputs(space).values():
        H = moments(readers[0])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H)) if H.ndim > 1 else None
        for reader in readers:
            param = model.get_parameter(reader + ".weight")
            W = placement.local(param).to(H.dtype)
            whole = placement.sum_shards([((W @ H) * W if H.ndim > 1 else W.square() * H).sum()[None]])[0]
            for dim, slot in slots[reader]:
                width = dim.size * slot.block
                columns = W.narrow(1, slot.start, width).reshape(-1, dim.size, slot.block)
                G = torch.einsum("oub,ouc->ubc", columns, columns)
                G = placement.sum_shards([G.flatten()])[0].view_as(G)
                if inverse is None:
                    error = (G.diagonal(dim1=1, dim2=2) * H.narrow(0, slot.start, width).view(-1, slot.block)).sum(1)
                else:
                    error = removal_errors(diagonal_blocks(inverse, slot.start, dim.size, slot.block), G)
                share = error / whole.clamp(min=torch.finfo(H.dtype).tiny)
                totals[dim.name] = totals[dim.name] + share if dim.name in totals else share
                counts[dim.name] += slot.block * live.get((slot.param, 0), param.shape[0])
    scores: Scores = {}
    for kind, bundle in space.bundles.items():
        scores[kind] = torch.stack([totals[dim.name] / counts[dim.name] for dim in bundle.dims]).cpu()
        for row, dim in enumerate(bundle.dims):
            if retired.get(dim.name):
                scores[kind][row, retired[dim.name]] = torch.inf
    return scores


def removal_errors(inverse: Tensor, G: Tensor) -> Tensor:
    """Returns tr(W_P ([H⁻¹]_PP)⁻¹ W_Pᵀ) of every unit: the error that is left of its removal after the update.

    Args:
        inverse: the blocks [H⁻¹]_PP (units, block, block) of every unit.
    """
    errors: Tensor = torch.linalg.solve(inverse, G).diagonal(dim1=1, dim2=2).sum(1)
    return errors


def diagonal_blocks(matrix: Tensor, start: int, units: int, block: int) -> Tensor:
    """Returns the blocks (units, block, block) on a square matrix's diagonal from `start` on."""
    part = matrix[start : start + units * block, start : start + units * block]
    return part.view(units, block, units, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _everywhere(tensor: Tensor, placement: Placement) -> Tensor:
    """Returns the sum over all ranks, on each of them."""
    return placement.from_rank(placement.sum_to(tensor, 0), 0)
