"""OLMo 2 for llama.cpp, whose graph takes the hidden size for heads × head size: the same function, wider by zeros.

Pruning leaves a hidden size N and heads whose queries have N_q entries and keys N_k, of any ratio. Hidden dimensions
and heads that are zero are added until hidden size and queries are N' wide, keys N_k'. They change nothing but the mean
squares in the norms, which fall by N/N' for hidden states, N_q/N' for queries, N_k/N_k' for keys. With ε' = ε N/N' a
norm of hidden states gives √(N'/N) times what it did, so its gains are multiplied by √(N/N'). All norms of a file share
one ε; queries and keys get along with it when they are multiplied by √(N/N_q) and √(N N_k' / (N' N_k)) before their
norms, and the gains of these by √(N_q/N') and √(N_k/N_k').
"""

import copy
from itertools import count
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from efficientllm.delivery.gguf.architecture import ARCHITECTURES, CANDIDATES, head_dim
from efficientllm.models.load import build_model
from efficientllm.space.dims import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_BLOCK = 256  # of what quantised types store together


def widens(config: Any) -> bool:
    """Returns whether a model is written wider than it is."""
    if config.is_heterogeneous:  # layers with widths of their own are `deci`'s, or refused
        return False
    names = CANDIDATES.get(config.model_type, ())
    width = config.num_attention_heads * head_dim(config)
    return any(ARCHITECTURES[name].widened for name in names) and width != config.hidden_size


def widened_shape(shape: Shape, head_dim: int) -> Shape:
    """Returns the narrowest shape that holds another one and whose heads × head size is its hidden size.

    It has the multiples (up to 256) that both widths had; among equally narrow ones it has the fewest key-value heads.
    """
    hidden, kv, query = (shape[kind] for kind in ("hidden", "kv", "query"))
    width = kv * query * head_dim
    if hidden == width:
        return shape
    multiple = gcd(hidden, width, LARGEST_BLOCK)
    found = []
    for groups in range(kv, max(kv, -(-hidden // head_dim)) + 1):
        least = max(query, -(-hidden // (groups * head_dim)))
        queries = next(each for each in count(least) if groups * each * head_dim % multiple == 0)
        found.append((groups * queries * head_dim, groups, queries))
    hidden, kv, query = min(found)
    return {**shape, "hidden": hidden, "kv": kv, "query": query}


def widened_config(config: Any) -> Any:
    """Returns the config of the wider model."""
    kv = config.num_key_value_heads
    shape = {"hidden": config.hidden_size, "kv": kv, "query": config.num_attention_heads // kv}
    wide = widened_shape(shape, head_dim(config))
    changed = copy.deepcopy(config)
    changed.head_dim = head_dim(config)
    changed.hidden_size, changed.num_key_value_heads = wide["hidden"], wide["kv"]
    changed.num_attention_heads = wide["kv"] * wide["query"]
    changed.rms_norm_eps = config.rms_norm_eps * config.hidden_size / wide["hidden"]
    return changed


@torch.no_grad()
def widened(model: "PreTrainedModel") -> "PreTrainedModel":
    """Returns the wider model, an ordinary one that computes the same function."""
    config: Any = model.config
    wide: Any = build_model(widened_config(config), model.dtype).eval()
    size, kv = head_dim(config), config.num_key_value_heads
    query, new_query = (each.num_attention_heads // each.num_key_value_heads for each in (config, wide.config))
    first = torch.arange(query * size)  # a group's queries come first in its wider block
    queries = torch.cat([group * new_query * size + first for group in range(kv)])
    keys, hidden = torch.arange(kv * size), torch.arange(config.hidden_size)
    rows = {"q": queries, "k": keys, "v": keys, "o": hidden, "down": hidden}
    columns = {"o": queries, "down": None}
    factors = _factors(config, wide.config)
    old = dict(model.named_parameters())
    for name, param in wide.named_parameters():
        kind = name.split(".")[-2]
        part = kind.removesuffix("_proj")
        if kind in ("q_norm", "k_norm"):
            axes: list[Tensor | None] = [rows[kind[0]]]
        elif kind.endswith("norm"):
            axes = [hidden]
        else:
            axes = [rows.get(part), columns.get(part, hidden)][: param.ndim]
        param.zero_()
        place = torch.meshgrid(
            *(torch.arange(length) if axis is None else axis for length, axis in zip(param.shape, axes, strict=True)),
            indexing="ij",
        )
        norm = "norm" if kind.endswith("layernorm") else kind
        param[place] = old[name] * factors.get(norm, 1.0)
    return wide


def _factors(config: Any, wide: Any) -> dict[str, float]:
    """Returns what a parameter is multiplied by, by the name of its module."""
    hidden = config.hidden_size / wide.hidden_size
    query = config.num_attention_heads / wide.num_attention_heads
    key = config.num_key_value_heads / wide.num_key_value_heads
    return {
        "norm": hidden**0.5,
        "q_proj": (hidden / query) ** 0.5,
        "k_proj": (hidden / key) ** 0.5,
        "q_norm": query**0.5,
        "k_norm": key**0.5,
    }
