"""Removal: retire changes the function and leaves shapes, compact changes shapes and leaves the function (section 5)."""

from collections import defaultdict
from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efficientllm.errors import UnsupportedModelError
from efficientllm.pruning.norms import LiveNorms
from efficientllm.pruning.saliency import Retired, live_lengths
from efficientllm.space.dims import Dim, Shape, Space


@torch.no_grad()
def retire_(model: nn.Module, optimizer: Optimizer | None, space: Space, units: Mapping[str, list[int]]) -> None:
    """Zeroes the producer rows and consumer columns of units (by dim name), with their gradients and moments."""
    params = dict(model.named_parameters())
    dims = {dim.name: dim for dim in space.dims()}
    for name, chosen in units.items():
        for slot in dims[name].slots:
            if slot.role == "rider" or not chosen:
                continue
            param = params[slot.param]
            index = entries(slot.start, slot.block, chosen).to(param.device)
            for tensor in (param, param.grad, *state_tensors(optimizer, param).values()):
                if tensor is not None:
                    tensor.index_fill_(slot.axis, index, 0)


def count_live_(model: nn.Module, norms: LiveNorms, space: Space, retired: Retired) -> None:
    """Makes the norms and the embedding's scale count the units that are not retired."""
    live = live_lengths(space, retired)
    params = dict(model.named_parameters())
    riders = {slot.param for dim in space.dims() for slot in dim.slots if slot.role == "rider"}
    for name in riders:
        size = params[name].shape[0]
        norms.set(model.get_submodule(name.rpartition(".")[0]), live.get((name, 0), size), size)
    hidden = space.shape["hidden"] - len(retired.get("hidden", ()))
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # Gemma multiplies embeddings by sqrt(hidden_size)
            module.scalar_embed_scale = sqrt(hidden)
            module.embed_scale.fill_(sqrt(hidden))


@torch.no_grad()
def compact_(model: nn.Module, optimizer: Optimizer | None, space: Space, units: Retired) -> None:
    """Drops retired units from weights, gradients, moments and config; the function stays what it was.

    Every parameter that loses entries becomes a new Parameter (a changed shape under an old autograd graph fails in the
    next backward), re-pointed in every module that shares it and in the optimizer.

    Raises:
        UnsupportedModelError: if the optimizer keeps state of another shape than its parameter's.
    """
    gone: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for dim in space.dims():
        if units.get(dim.name):
            for slot in dim.slots:
                gone[slot.param, slot.axis].append(entries(slot.start, slot.block, units[dim.name]))
    kept: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    params = dict(model.named_parameters())
    for (name, axis), indices in gone.items():
        mask = torch.ones(params[name].shape[axis], dtype=torch.bool)
        mask[torch.cat(indices)] = False
        kept[name].append((axis, mask.nonzero().flatten().to(params[name].device)))
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for attribute, param in module.named_parameters(recurse=False):
            places[param].append((module, attribute))
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, axes in kept.items():
        old = params[name]
        new = nn.Parameter(_select(old.data, axes), requires_grad=old.requires_grad)
        new.grad = None if old.grad is None else _select(old.grad, axes)
        for module, attribute in places[old]:
            setattr(module, attribute, new)
        if optimizer is not None and old in optimizer.state:
            sliced = {key: _select(value, axes) for key, value in state_tensors(optimizer, old).items()}
            optimizer.state[new] = {**optimizer.state.pop(old), **sliced}
        replaced[old] = new
    for group in optimizer.param_groups if optimizer is not None else ():
        group["params"] = [replaced.get(param, param) for param in group["params"]]
    shape = {
        kind: bundle.size - len(units.get(bundle.dims[0].name, ())) for kind, bundle in space.bundles.items()
    }
    resize_config(model, shape, space.head_dim)


def resize_config(model: nn.Module, shape: Shape, head_dim: int) -> None:
    """Writes a shape into the config and into the attributes that modules copied from it."""
    config = model.config
    old_hidden, old_ffn = config.hidden_size, config.intermediate_size
    config.hidden_size, config.intermediate_size = shape["hidden"], shape["ffn"]
    config.num_key_value_heads = shape["kv"]
    config.num_attention_heads = shape["kv"] * shape["query"]
    config.head_dim = head_dim
    copies = {"hidden_size": old_hidden, "intermediate_size": old_ffn}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
        for attribute, old in copies.items():
            if getattr(module, attribute, None) == old:
                setattr(module, attribute, getattr(config, attribute))
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = shape["query"]
        if hasattr(module, "num_key_value_heads"):
            module.num_key_value_heads = shape["kv"]
        for attribute in ("num_heads", "num_attention_heads"):
            if hasattr(module, attribute) and isinstance(getattr(module, attribute), int):
                setattr(module, attribute, config.num_attention_heads)


def entries(start: int, block: int, units: list[int]) -> Tensor:
    """Returns the indices that units own along a slot's axis."""
    first = start + torch.tensor(units, dtype=torch.long) * block
    return (first[:, None] + torch.arange(block)).flatten()


def state_tensors(optimizer: Optimizer | None, param: nn.Parameter) -> dict[str, Tensor]:
    """Returns the optimizer's tensors that have a parameter's shape, by their name in its state.

    Raises:
        UnsupportedModelError: if it keeps a tensor of another shape (a factored second moment).
    """
    state: dict[str, Any] = optimizer.state.get(param, {}) if optimizer is not None else {}
    found = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.numel() == 1 and value.shape != param.shape:
            continue  # Adam's step counter
        if value.shape != param.shape:
            raise UnsupportedModelError(
                f"{type(optimizer).__name__} keeps '{name}' of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(param.shape)}; use an optimizer whose state has the parameter's shape, such as AdamW"
            )
        found[name] = value
    return found


def survivors(dim: Dim, units: Retired) -> list[int]:
    """Returns the units of a dim that stay, in order."""
    gone = set(units.get(dim.name, ()))
    return [unit for unit in range(dim.size) if unit not in gone]


def _select(tensor: Tensor, axes: list[tuple[int, Tensor]]) -> Tensor:
    for axis, index in axes:
        tensor = tensor.index_select(axis, index)
    return tensor

