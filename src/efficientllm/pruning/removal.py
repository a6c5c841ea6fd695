"""Removal: retire changes the function and leaves shapes, compact changes shapes and leaves the function."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efficientllm.errors import UnsupportedModelError
from efficientllm.models.heterogeneous import follow_config_, resize_modules_, set_widths_
from efficientllm.pruning.norms import LiveNorms
from efficientllm.pruning.saliency import Retired, live_lengths
from efficientllm.space.dims import Dim, Shape, Space


@torch.no_grad()
def retire_(
    model: nn.Module,
    optimizer: Optimizer | None,
    space: Space,
    units: Mapping[str, list[int]],
    local: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    first_row: Callable[[Tensor], int] = lambda tensor: 0,
) -> None:
    """Zeroes the producer rows and consumer columns of units (by dim name), with their gradients and moments.

    `local` gives the part of a tensor that is held here, `first_row` the entry of axis 0 that it begins with.
    """
    dims, params = {dim.name: dim for dim in space.dims()}, dict(model.named_parameters())
    slots = [(slot, chosen) for name, chosen in units.items() if chosen for slot in dims[name].slots]
    places = [(slot, chosen, params[slot.param]) for slot, chosen in slots if slot.role != "rider"]
    indices = []
    for slot, chosen, param in places:
        first = first_row(param) if slot.axis == 0 else 0
        held = range(local(param).shape[slot.axis])
        index = [entry - first for entry in entries(slot.start, slot.block, chosen)]
        indices.append([entry for entry in index if entry in held])
    there = moved(indices, [param.device for _, _, param in places])
    for (slot, _, param), gone in zip(places, there, strict=True):
        for tensor in (param, param.grad, *state_tensors(optimizer, param).values()):
            if tensor is not None:
                local(tensor).index_fill_(slot.axis, gone, 0)


def moved(indices: list[list[int]], devices: list[torch.device]) -> list[Tensor]:
    """Returns each list on its device, with one copy a device: each copy waits until all before it is done."""
    whole = torch.tensor(list(chain.from_iterable(indices)), dtype=torch.long)
    lengths = [len(index) for index in indices]
    there = {device: torch.split(whole.to(device), lengths) for device in set(devices)}
    return [there[device][number] for number, device in enumerate(devices)]


def count_live_(model: nn.Module, norms: LiveNorms, space: Space, retired: Retired) -> None:
    """Makes the norms and the embedding's scale count the units that are not retired."""
    live = live_lengths(space, retired)
    riders = {slot.param for dim in space.dims() for slot in dim.slots if slot.role == "rider"}
    for name in riders:
        norm: Any = model.get_submodule(name.rpartition(".")[0])
        size = len(norm.weight)
        norms.set(norm, live.get((name, 0), size), size)
    hidden = space.shape["hidden"] - len(retired.get("hidden", ()))
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    if hasattr(embedding, "scalar_embed_scale"):  # Gemma multiplies embeddings by sqrt(hidden_size)
        embedding.scalar_embed_scale = sqrt(hidden)
        embedding.embed_scale.fill_(sqrt(hidden))


@torch.no_grad()
def compact_(model: nn.Module, optimizer: Optimizer | None, space: Space, units: Retired) -> None:
    """Drops retired units from weights, gradients, moments and config; the function stays what it was.

    Every parameter that loses entries becomes a new Parameter (a changed shape under an old autograd graph fails in the
    next backward), re-pointed in every module that shares it and in the optimizer.

    Raises:
        UnsupportedModelError: if the optimizer keeps state of another shape than its parameter's.
    """
    kept = kept_entries(model, space, units)
    params = dict(model.named_parameters())
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for attribute, param in module.named_parameters(recurse=False):
            places[param].append((module, attribute))
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, axes in kept.items():
        old = params[name]
        grad, state = take_(old, optimizer, partial(select, axes=axes))
        new = nn.Parameter(select(old.data, axes), requires_grad=old.requires_grad)
        old.data = old.data.new_empty(0)  # the old and the new model are never in memory together
        new.grad = grad
        if optimizer is not None and state:
            optimizer.state[new] = state
        for module, attribute in places[old]:
            setattr(module, attribute, new)
        replaced[old] = new
    for group in optimizer.param_groups if optimizer is not None else ():
        group["params"] = [replaced.get(param, param) for param in group["params"]]
    shape = {name: bundle.size - len(units.get(bundle.dims[0].name, ())) for name, bundle in space.bundles.items()}
    resize_config(model, shape, space.head_dim)


def take_(
    old: nn.Parameter, optimizer: Optimizer | None, cut: Callable[[Tensor], Tensor]
) -> tuple[Tensor | None, dict[str, Any]]:
    """Takes a parameter's gradient and optimizer state from it and returns them, cut.

    One tensor after the other, so that no two of them stand in both sizes at once.
    """
    names = list(state_tensors(optimizer, old))  # names alone: the tensors are to go
    grad, old.grad = None if old.grad is None else cut(old.grad), None
    state: dict[str, Any] = optimizer.state.pop(old, {}) if optimizer is not None else {}
    for name in names:
        state[name] = cut(state[name])
    return grad, state


def kept_entries(model: nn.Module, space: Space, units: Retired) -> dict[str, list[tuple[int, Tensor]]]:
    """Returns which entries stay of every parameter that loses some: (axis, indices) pairs by its name."""
    gone: dict[tuple[str, int], list[int]] = defaultdict(list)
    for dim in space.dims():
        if units.get(dim.name):
            for slot in dim.slots:
                gone[slot.param, slot.axis].extend(entries(slot.start, slot.block, units[dim.name]))
    kept: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    params = dict(model.named_parameters())
    for (name, axis), indices in gone.items():
        mask = torch.ones(params[name].shape[axis], dtype=torch.bool)
        mask[indices] = False
        kept[name].append((axis, mask.nonzero().flatten().to(params[name].device)))
    return kept


def resize_config(model: nn.Module, shape: Shape, head_dim: int) -> None:
    """Writes a shape into the config and into the attributes that modules copied from it, by their names."""
    set_widths_(model.config, shape, head_dim)
    resize_modules_(model, shape)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
    follow_config_(model)


def entries(start: int, block: int, units: list[int]) -> list[int]:
    """Returns the indices that units own along a slot's axis."""
    return [start + unit * block + entry for unit in units for entry in range(block)]


def state_tensors(optimizer: Optimizer | None, param: nn.Parameter) -> dict[str, Tensor]:
    """Returns the optimizer's tensors that have a parameter's shape, by their name in its state.

    Raises:
        UnsupportedModelError: if it keeps anything larger than a number in another shape (a factored second moment).
    """
    state: dict[str, Any] = optimizer.state.get(param, {}) if optimizer is not None else {}
    found = {}
    for name, value in state.items():
        if not isinstance(value, Tensor | list | tuple | dict) or (
            isinstance(value, Tensor) and value.numel() == 1 and value.shape != param.shape
        ):
            continue  # Adam's step counter
        if not isinstance(value, Tensor) or value.shape != param.shape:
            kept = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"(a {type(value).__name__})"
            raise UnsupportedModelError(
                f"{type(optimizer).__name__} keeps '{name}' {kept} for a parameter of shape "
                f"{tuple(param.shape)}; use an optimizer whose state has the parameter's shape, such as AdamW"
            )
        found[name] = value
    return found


def check_state(optimizer: Optimizer) -> None:
    """Raises UnsupportedModelError if the optimizer keeps state that cannot be cut, before anything is changed."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state_tensors(optimizer, param)


def survivors(dim: Dim, units: Retired) -> list[int]:
    """Returns the units of a dim that stay, in order."""
    gone = set(units.get(dim.name, ()))
    return [unit for unit in range(dim.size) if unit not in gone]


def select(tensor: Tensor, axes: list[tuple[int, Tensor]]) -> Tensor:
    """Returns a tensor's entries at (axis, indices) pairs."""
    for axis, index in axes:
        tensor = tensor.index_select(axis, index)
    return tensor
