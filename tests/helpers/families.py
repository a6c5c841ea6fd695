"""A tiny random model of every supported family, its sizes all different, so that swapped axes fail."""

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from efficientllm.models.heterogeneous import ALLOWANCE, READ_ONE_WIDTH
from efficientllm.models.load import build_model

VOCAB, HIDDEN, FFN, LAYERS, HEAD_DIM = 61, 24, 40, 2, 8
HEADS = {"grouped": (2, 3), "multihead": (4, 1)}  # KV heads, query heads of each; 6 and 4 divide the hidden size


@dataclass(frozen=True)
class Family:
    """A family's tiny config and what is special about it, so that no test spells its name.

    Attributes:
        changes: of the config that all share.
        norms: what a norm of queries and keys runs over: "head" each by itself, "heads" all of them, whose live
            entries then count.
        heads_divide_hidden: whether its config refuses a hidden size that its heads do not divide.
        saved_as: the family that takes every size of it, where its own config does not.
        caps_logits: whether its logits may be soft-capped.
        fused: whether queries, keys and values are one weight.
        deci: whether llama.cpp's graph for layers of their own widths computes it.
        widened: whether its GGUF is wider than the model, by zeros.
        graphs: llama.cpp's graphs that may hold it, by its shape.
        half_gelu: whether llama.cpp looks its activation up in half precision (gguf/convert.py, HALF_GELU).
        plain_gguf: settings under which llama.cpp's graph fits it.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    norms: Literal["", "head", "heads"] = ""
    heads_divide_hidden: bool = False
    saved_as: str | None = None
    caps_logits: bool = False
    fused: bool = False
    deci: bool = False
    widened: bool = False
    graphs: int = 1
    half_gelu: bool = False
    plain_gguf: dict[str, Any] = field(default_factory=dict)


TIED = {"tie_word_embeddings": True}
GEMMA = {**TIED, "query_pre_attn_scalar": 9, "sliding_window": 5}
FAMILIES: dict[str, Family] = {
    "llama": Family(saved_as="mistral", deci=True),
    "llama-tied": Family(TIED, saved_as="mistral", deci=True),
    "llama-bias": Family({"attention_bias": True, "mlp_bias": True}, heads_divide_hidden=True, deci=True),
    "mistral": Family({"sliding_window": 5}, deci=True),
    "qwen2": Family(deci=True, graphs=2),
    "qwen3": Family({"attention_bias": True}, norms="head", plain_gguf={"attention_bias": False}),
    "smollm3": Family(TIED, deci=True),
    "phi3": Family(fused=True, deci=True, graphs=2),
    "olmo2": Family(norms="heads", widened=True),
    "granite": Family(
        {**TIED, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 1.5},
    ),
    "gemma": Family(TIED, half_gelu=True),
    "gemma2": Family(GEMMA, heads_divide_hidden=True, caps_logits=True, half_gelu=True),
    "gemma3_text": Family(GEMMA, norms="head", heads_divide_hidden=True, caps_logits=True, half_gelu=True),
}
NAMES = list(FAMILIES)
DIVIDED = [name for name, family in FAMILIES.items() if family.heads_divide_hidden]
EVERY = [(name, heads) for name in NAMES for heads in HEADS]


def differing(name: str) -> dict[str, Any]:
    """Returns changes of a grouped tiny config that give each of its first two layers widths of its own."""
    own = {
        0: {"intermediate_size": 37},
        1: {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
    }
    return {"per_layer_config": own, **({ALLOWANCE: True} if name.split("-")[0] in READ_ONE_WIDTH else {})}


def make_config(name: str, heads: str = "grouped", **changes: Any) -> Any:
    """Returns the tiny config of a family."""
    num_kv, group = HEADS[heads]
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": num_kv * group,
        "num_key_value_heads": num_kv,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-2,  # large, so that a wrong epsilon shows
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **FAMILIES[name].changes,
        **changes,
    }
    return AutoConfig.for_model(name.split("-")[0], **values)


def make_model(
    name: str, heads: str = "grouped", *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> Any:
    """Returns a model with every parameter random, gains and biases too."""
    model = stock(make_config(name, heads, **changes), dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.copy_(noise * 0.2 + (0.8 if "norm" in key else 0.0))
    return model


def stock(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Returns what transformers itself builds from a config, unless its layers differ."""
    config = copy.deepcopy(config)
    return build_model(type(config).from_dict(config.to_dict()), dtype).train()


def meta_model(config: Any) -> Any:
    with torch.device("meta"):
        return build_model(copy.deepcopy(config))


def capped(name: str) -> dict[str, Any]:
    """Returns changes of a config under which logits are soft-capped, where the family knows that."""
    return {"final_logit_softcapping": 0.5} if FAMILIES[name].caps_logits else {}


def batch(seed: int = 0, rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=batch() if tokens is None else tokens, use_cache=False).logits
    return result


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def numel(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())
