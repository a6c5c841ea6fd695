"""Saliency: what removing a unit would cost the loss (docs/method.md section 3). Higher is costlier to remove.

Scores are per-element means, not sums, so that a head and a channel compare (EfficientLLM, figure A0).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from efficientllm.space.dims import Slot, Space

Scored = Literal["output", "all"]
Saliency = Literal["taylor1", "taylor2"]
Scores = dict[str, Tensor]  # by bundle: (its dims, units), float32, on the CPU
Retired = Mapping[str, list[int]]  # units that are zero but not yet compacted, by dim name

CHUNK = 4_194_304  # elements of one temporary: |w·g| of a whole embedding would add to the peak memory


def first_order(weight: Tensor, grad: Tensor, fisher: Tensor | None = None) -> Tensor:
    """Returns |g·w| of every element: the first-order loss change of setting it to zero."""
    return (weight * grad).abs_()


def second_order(weight: Tensor, grad: Tensor, fisher: Tensor | None = None) -> Tensor:
    """Returns |g·w - ½·F·w²| with the diagonal Fisher F (LLM-Pruner); F = g² where only the gradient is known."""
    change = weight * grad
    curvature = change.square() if fisher is None else weight.square().mul_(fisher)
    return change.sub_(curvature, alpha=0.5).abs_()


SALIENCIES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "taylor1": first_order,
    "taylor2": second_order,
}


@dataclass(frozen=True)
class Sums:
    """Element saliencies summed over every unit, before they are read.

    Attributes:
        totals: of all units, one dim after the other, on the device.
        counts: elements of a unit by dim, in that order; retired ones count nowhere.
    """

    totals: Tensor
    counts: dict[str, int]


def score_units(space: Space, sums: Sums, retired: Retired | None = None) -> Scores | None:
    """Returns the mean element saliency of every unit, infinity for retired ones; waits for the device.

    None if a sum is not finite: then the gradients were broken, which says nothing about any unit.
    """
    sizes = {dim.name: dim.size for dim in space.dims()}
    sizes = {name: sizes[name] for name in sums.counts}
    totals = sums.totals.detach().cpu()  # choosing is the host's business
    if not bool(totals.isfinite().all()):
        return None
    counts = torch.tensor(list(sums.counts.values()), dtype=totals.dtype)
    lengths = list(sizes.values())
    means = dict(
        zip(sizes, torch.split(totals / counts.repeat_interleave(torch.tensor(lengths)), lengths), strict=True)
    )
    for name, units in (retired or {}).items():
        if units:
            means[name][units] = torch.inf
    return {name: torch.stack([means[dim.name] for dim in bundle.dims]) for name, bundle in space.bundles.items()}


def sum_units(
    space: Space,
    weights: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    *,
    saliency: Saliency = "taylor1",
    scored: Scored = "output",
    retired: Retired | None = None,
    fishers: Mapping[str, Tensor] | None = None,
    first_rows: Mapping[str, int] | None = None,
    shapes: Mapping[str, torch.Size] | None = None,
    add_up: Callable[[list[Tensor]], list[Tensor]] = list,
) -> Sums:
    """Returns the saliencies of all units' elements, summed; never waits for the device.

    Args:
        weights, grads: by parameter name, any shape that the space's slots describe; a missing gradient scores zero.
        scored: "output" takes the output layers' elements (columns of O and down, rows of O and down, embedding
            columns), "all" every producer and consumer.
        fishers: diagonal Fisher by parameter name; without it F = g².
        first_rows, shapes, add_up: where the tensors are parts of larger ones, some rows each: which row of the whole
            each begins with, the whole's shape, and what sums a list of vectors over all parts.
    """
    element = SALIENCIES[saliency]
    by_param: dict[str, list[tuple[str, int, Slot]]] = defaultdict(list)
    for dim in space.dims():
        for slot in dim.slots:
            if slot.role != "rider" and (slot.output or scored == "all"):
                by_param[slot.param].append((dim.name, dim.size, slot))
    live = live_lengths(space, retired or {})
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    for name, slots in by_param.items():
        weight, grad = weights[name], grads[name]
        shape = shapes[name] if shapes else weight.shape
        first_row = first_rows[name] if first_rows else 0
        axes = sorted({slot.axis for _, _, slot in slots})
        sums = _axis_sums(weight, grad, fishers.get(name) if fishers else None, axes, element, first_row, shape[0])
        for dim_name, size, slot in slots:
            vector = sums[slot.axis].narrow(0, slot.start, size * slot.block).view(size, slot.block).sum(1)
            totals[dim_name] = totals[dim_name] + vector if dim_name in totals else vector
            others = 1
            for axis, length in enumerate(shape):
                if axis != slot.axis:
                    others *= live.get((name, axis), length)
            counts[dim_name] += slot.block * others
    return Sums(torch.cat(add_up(list(totals.values()))), {name: counts[name] for name in totals})


def live_lengths(space: Space, retired: Retired) -> dict[tuple[str, int], int]:
    """Returns how many entries of each (parameter, axis) belong to live units, where some do not; means count those."""
    gone: dict[tuple[str, int], int] = defaultdict(int)
    length: dict[tuple[str, int], int] = defaultdict(int)
    for dim in space.dims():
        if dim.kind == "query":
            continue  # its entries are the KV group's, already counted; query heads never wait
        for slot in dim.slots:
            length[slot.param, slot.axis] += dim.size * slot.block
            gone[slot.param, slot.axis] += len(retired.get(dim.name, ())) * slot.block
    return {key: length[key] - count for key, count in gone.items() if count}


def smooth(previous: Scores | None, scores: Scores, decay: float) -> Scores:
    """Returns the exponential moving average of scores, each step's divided by its sum first.

    Clipping gives every step's gradient another factor, which a plain average would weigh the steps by.
    """
    total = sum(float(score[score.isfinite()].double().sum()) for score in scores.values()) or 1.0
    normed = {name: score / total for name, score in scores.items()}
    if previous is None:
        return normed
    mixed = {name: previous[name] * decay + score * (1 - decay) for name, score in normed.items()}
    return {name: torch.where(normed[name].isinf(), normed[name], score) for name, score in mixed.items()}


def _axis_sums(
    weight: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None,
    axes: list[int],
    element: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    first_row: int,
    num_rows: int,
) -> dict[int, Tensor]:
    """Returns the element saliencies of one parameter summed over all but each axis, a chunk of rows at a time."""
    precision = torch.promote_types(weight.dtype, torch.float32)
    lengths = (num_rows, *weight.shape[1:])
    sums = {axis: torch.zeros(lengths[axis], dtype=precision, device=weight.device) for axis in axes}
    if grad is None:
        return sums
    rows = max(1, CHUNK // max(1, weight.numel() // max(1, len(weight))))
    for start in range(0, weight.shape[0], rows):
        stop = min(start + rows, weight.shape[0])
        part = element(
            weight[start:stop].to(precision),
            grad[start:stop].to(precision),
            None if fisher is None else fisher[start:stop].to(precision),
        )
        for axis in axes:
            if axis == 0:
                sums[0][first_row + start : first_row + stop] = part if part.ndim == 1 else part.sum(1)
            else:
                sums[axis] += part.sum(0)
    return sums
