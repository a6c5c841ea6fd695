"""Inputs of the consumers, kept from the pass that trains: what variant B solves with (docs/method.md section 6)."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efficientllm.errors import TrainingError
from efficientllm.pruning.compensation import damped_, gram, solve, solve_by_rows, update
from efficientllm.pruning.placement import Placement
from efficientllm.pruning.removal import entries, moved
from efficientllm.space.dims import Space

ROW_CAP = 8192  # rows of X kept per layer input and step; never fewer than twice the in-channels


class InputSampler:
    """Keeps up to ROW_CAP rows of every distinct consumer input of a step; `clear` forgets them.

    The rows are views of activations, so without gradient accumulation they cost what keeping those alive costs. Within
    a pass they are put down on the modules themselves, by one hook that knows no layer's name, so that compiled layers
    still share a graph; when the pass is over they are collected.
    """

    def __init__(self, model: nn.Module, space: Space) -> None:
        names = {tuple(names): names[0] for names in consumer_inputs(space).values()}.values()
        self.readers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        self.rows: dict[str, list[Tensor]] = defaultdict(list)
        self._hooks = [model.register_forward_pre_hook(self._begin), model.register_forward_hook(self.collect)]
        for reader in self.readers.values():
            reader.kept_inputs = []
            self._hooks.append(reader.register_forward_pre_hook(keep_input))

    def inputs(self, reader: str) -> Tensor:
        """Returns the kept rows (rows, in) of one input, by the name of its first reader."""
        return torch.cat(self.rows[reader])

    def clear(self) -> None:
        self._begin()
        self.rows.clear()

    def close(self) -> None:
        self.clear()
        for hook in self._hooks:
            hook.remove()
        for reader in self.readers.values():
            reader.__dict__.pop("kept_inputs", None)
        self.readers = {}

    def collect(self, *pass_: Any) -> None:
        """Takes what a pass has put down; what a checkpointed block puts down again in the backward pass is left.

        Where the forward pass puts down nothing (reentrant checkpointing, a loop that calls the decoder below its head)
        the rows come later: they are taken at the next pass, or when they are needed.
        """
        for name, reader in self.readers.items():
            for X in reader.kept_inputs or ():
                room = row_cap(X) - sum(len(rows) for rows in self.rows[name])
                if room > 0:
                    self.rows[name].append(thinned(X, room))
            reader.kept_inputs = None if reader.kept_inputs else reader.kept_inputs

    def _begin(self, *pass_: Any) -> None:
        self.collect()
        for reader in self.readers.values():
            reader.kept_inputs = []


def keep_input(reader: Any, args: tuple[Any, ...]) -> None:
    """The hook: puts the rows of a module's input down on the module, at most the number kept per step."""
    if torch.is_grad_enabled() and reader.kept_inputs is not None:  # neither in an evaluation nor for the second time
        X = args[0].detach().flatten(0, -2)
        room = row_cap(X) - sum(len(rows) for rows in reader.kept_inputs)
        if room > 0:
            reader.kept_inputs.append(thinned(X, room))


def row_cap(X: Tensor) -> int:
    """Returns the most rows (of `X`'s width) that are kept of a step."""
    return max(ROW_CAP, 2 * X.shape[-1])


def thinned(X: Tensor, room: int) -> Tensor:
    """Returns every n-th row, with n such that at most `room` are left."""
    stride = -(-len(X) // room)
    return X if stride == 1 else X[::stride].clone()  # a view would keep all of X alive


def consumer_inputs(space: Space) -> dict[tuple[str, str], list[str]]:
    """Returns the modules that read each distinct input, by (parent module, kind of in-channel); no head."""
    readers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for dim in space.dims():
        for slot in dim.slots:
            module = slot.param.rpartition(".")[0]
            if slot.role == "consumer" and slot.axis == 1 and not module.endswith("lm_head"):
                channel = "query" if dim.kind == "kv" else dim.kind
                names = readers[module.rpartition(".")[0], channel]
                if module not in names:
                    names.append(module)
    return dict(readers)


@torch.no_grad()
def compensate_(
    model: nn.Module,
    space: Space,
    units: Mapping[str, list[int]],
    sampler: InputSampler,
    placement: Placement | None = None,
) -> None:
    """Lets every consumer of units (by dim name) absorb them: one solve per distinct layer input.

    One process that has all rows, and fewer of them than in-channels, solves by rows. Otherwise the ranks take turns:
    the inputs' moments of as many layers as there are ranks are summed, each at another rank, which solves with them;
    the narrow Z goes back to all, and each rank updates the rows that it holds. Only the end waits for the device.

    Raises:
        TrainingError: if moments are not positive definite; weights are not to be used then.
    """
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        _compensate_(model, space, units, sampler, placement or Placement())


def _compensate_(
    model: nn.Module, space: Space, units: Mapping[str, list[int]], sampler: InputSampler, placement: Placement
) -> None:
    sampler.collect()
    removed: dict[str, set[int]] = defaultdict(set)
    for dim in space.dims():
        if units.get(dim.name):
            for slot in dim.slots:
                if slot.role == "consumer" and slot.axis == 1:
                    module = slot.param.rpartition(".")[0]
                    removed[module].update(entries(slot.start, slot.block, units[dim.name]))
    readers = [names for names in consumer_inputs(space).values() if names[0] in removed and sampler.rows[names[0]]]
    weights = [[placement.local(model.get_parameter(name + ".weight")) for name in names] for names in readers]
    gone = moved([sorted(removed[names[0]]) for names in readers], [each[0].device for each in weights])
    sound = []
    for start in range(0, len(readers), placement.num_ranks):
        turn = range(start, min(start + placement.num_ranks, len(readers)))
        mine: Tensor | None = None
        for rank, number in enumerate(turn):
            X = sampler.inputs(readers[number][0])
            if placement.has_all_rows and len(X) < X.shape[1]:
                mine = solve_by_rows(X, gone[number])
                continue
            H = placement.sum_to(gram(X), rank)
            if rank == placement.rank:
                mine = solve(damped_(H), gone[number])
        for rank, number in enumerate(turn):
            width = weights[number][0].shape[1]
            theirs = mine if rank == placement.rank else None
            Z = placement.from_rank(H.new_empty(width, len(gone[number])) if theirs is None else theirs, rank)
            sound.append(Z.isfinite().all())
            for weight in weights[number]:
                weight.copy_(update(weight, Z, gone[number]))
    if sound and not bool(torch.stack(sound).all()):
        raise TrainingError(
            "the second moments of a layer's inputs are not positive definite, so --compensate cannot solve with them; "
            "continue from the last checkpoint with a lower --lr, or without --compensate"
        )
