"""A tiny random model of every supported family, its sizes all different, so that swapped axes fail."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from efficientllm.models.heterogeneous import ALLOWANCE, READ_ONE_WIDTH
from efficientllm.models.load import build_model

VOCAB, HIDDEN, FFN, LAYERS, HEAD_DIM = 61, 24, 40, 2, 8
HEADS = {"grouped": (2, 3), "multihead": (4, 1)}  # KV heads, query heads of each; 6 and 4 divide the hidden size

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "smollm3": {"tie_word_embeddings": True},
    "phi3": {},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
        "tie_word_embeddings": True,
    },
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 9, "sliding_window": 5},
    "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 9, "sliding_window": 5},
}
NAMES = list(FAMILIES)
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
        **FAMILIES[name],
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
