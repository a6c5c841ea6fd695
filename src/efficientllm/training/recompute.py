"""Activation checkpointing: what the forward pass keeps for the backward pass, and what that computes again."""

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRODUCTS = {*flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}


def checkpoint_(model: "PreTrainedModel", how: str) -> None:
    """Makes the decoder layers keep less for the backward pass, which computes the rest again, to the same bits.

    Inside of what will be compiled or sharded: a compiled graph then keeps as little, and FSDP gathers a layer once for
    its backward pass.

    Args:
        how: `full` keeps what enters a layer, and computes all of it again, a third of a step's FLOPs;
            `selective` keeps what products and attention compute as well; norms, activation functions, rotations and
            sums are computed again. `none` changes nothing.
    """
    if how == "none":
        return
    more: dict[str, Any] = {}
    if how == "selective":
        more["context_fn"] = _contexts
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # it warns of operations in place
    for layer in model.model.layers:
        # a partial over a bound method, not a closure over the layer: a deep copy then calls itself
        layer.forward = partial(_checkpointed, layer.forward, more)


def _checkpointed(forward: Callable[..., Any], how: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # `selective` would keep products all the same
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    product = getattr(op, "overloadpacket", op) in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE
