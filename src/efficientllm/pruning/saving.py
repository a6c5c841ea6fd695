"""Saving a model that still shrinks: `save_pretrained` compacts first, and never leaves half a folder behind."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from efficientllm.errors import UnsupportedModelError
from efficientllm.space.limits import needs_heads_divide_hidden


def call_before_saving(model: nn.Module, prepare: Callable[[nn.Module], None]) -> None:
    """Lets `model.save_pretrained` call `prepare(model)` first: pending units would load as another function."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepare(self)
        check_saveable(self.config)
        return type(self).save_pretrained(self, *args, **kwargs)

    # a bound method, not a closure over the model: a deep copy then saves itself
    model.__dict__["save_pretrained"] = MethodType(save_pretrained, model)


def save_as_before(model: nn.Module) -> None:
    """Takes `call_before_saving` back."""
    model.__dict__.pop("save_pretrained", None)


def check_saveable(config: Any) -> None:
    """Raises UnsupportedModelError if transformers would refuse the config only after it began to write the folder."""
    for layer in config.per_layer_config if needs_heads_divide_hidden(config) else ():
        if config.hidden_size % layer.num_attention_heads:
            raise UnsupportedModelError(
                f"{config.model_type} cannot be saved at hidden size {config.hidden_size} with "
                f"{layer.num_attention_heads} heads; save when the open tile of hidden dimensions is complete"
            )
