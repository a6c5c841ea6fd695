"""Models whose layers have widths of their own, as `per_layer_config` in config.json gives them.

transformers' own classes build every layer from one width; these build each from its layer's. efficientllm saves this
file beside the weights, so that `trust_remote_code=True` loads them. It needs transformers alone.
"""
# mypy: disable-error-code="misc,call-arg,attr-defined"

from typing import Any

import transformers
from torch import nn


class PerLayer:
    """Mixed into a stock ...ForCausalLM: its decoder layers are built from `config.per_layer_config`, one each."""

    _auto_class = "AutoModelForCausalLM"  # saves this file beside the weights, and names it in config.json

    config: Any
    model: Any

    def __init__(self, config: Any) -> None:
        widths = config.to_dict().get("per_layer_config")
        config.per_layer_config = None  # all that is outside the layers is built as ever
        super().__init__(config)
        if widths:
            config.per_layer_config = widths
            self.model.layers = nn.ModuleList(
                type(layer)(config.per_layer_config[number], number) for number, layer in enumerate(self.model.layers)
            )
            share_config(self)
            self.post_init()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)
        share_config(self)


def share_config(model: Any) -> None:
    """Gives the modules of each layer that layer's config, rebuilt from the model's, and a layer's to the rotary one.

    That reads a number of heads too, and makes nothing of it, since the head size is given.
    """
    decoder = getattr(model, "model", model)
    own = list(model.config.per_layer_config)
    for part, config in zip((decoder.rotary_emb, *decoder.layers), (own[0], *own), strict=True):
        for module in part.modules():
            if hasattr(module, "config"):
                module.config = config


class PerLayerGemmaForCausalLM(PerLayer, transformers.GemmaForCausalLM):
    pass


class PerLayerGemma2ForCausalLM(PerLayer, transformers.Gemma2ForCausalLM):
    pass


class PerLayerGemma3ForCausalLM(PerLayer, transformers.Gemma3ForCausalLM):
    pass


class PerLayerGraniteForCausalLM(PerLayer, transformers.GraniteForCausalLM):
    pass


class PerLayerLlamaForCausalLM(PerLayer, transformers.LlamaForCausalLM):
    pass


class PerLayerMistralForCausalLM(PerLayer, transformers.MistralForCausalLM):
    pass


class PerLayerOlmo2ForCausalLM(PerLayer, transformers.Olmo2ForCausalLM):
    pass


class PerLayerPhi3ForCausalLM(PerLayer, transformers.Phi3ForCausalLM):
    pass


class PerLayerQwen2ForCausalLM(PerLayer, transformers.Qwen2ForCausalLM):
    pass


class PerLayerQwen3ForCausalLM(PerLayer, transformers.Qwen3ForCausalLM):
    pass


class PerLayerSmolLM3ForCausalLM(PerLayer, transformers.SmolLM3ForCausalLM):
    pass
