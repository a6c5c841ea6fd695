"""Llama's config refuses hidden sizes that its heads do not divide; Mistral's does not, and is the same function."""

from typing import Any

from torch import nn
from transformers import LlamaConfig, MistralConfig

from efficientllm.models.heterogeneous import ALLOWANCE, PREFIX, follow_config_, model_class
from efficientllm.space.limits import has_llama_bias


def mistral_config(config: LlamaConfig) -> MistralConfig:
    """Returns a bias-free Llama's Mistral config: same keys, same function, any shape (docs/method.md section 10)."""
    values = config.to_dict()
    values.pop(ALLOWANCE, None)
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version"):
        values.pop(name, None)
    values["sliding_window"] = None
    values["head_dim"] = config.head_dim
    mistral = MistralConfig(**values)
    mistral._attn_implementation = config._attn_implementation
    return mistral


def llama_config(config: MistralConfig) -> LlamaConfig:
    """Returns the Llama config of a Mistral without a window, for a shape that Llama accepts."""
    values = config.to_dict()
    for name in ("model_type", "architectures", "sliding_window", "transformers_version"):
        values.pop(name, None)
    return LlamaConfig(**values, attention_bias=False, mlp_bias=False)


def relabel_llama_(model: nn.Module) -> None:
    """Gives a bias-free Llama a Mistral's config and class name, so that `save_pretrained` works at every size."""
    config: Any = model.config
    if config.model_type != "llama" or has_llama_bias(config):
        return
    relabelled = mistral_config(config)
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = relabelled
    if type(model).__name__.removeprefix(PREFIX) == "LlamaForCausalLM":
        model.__class__ = model_class(relabelled)
        follow_config_(model)
