"""Models whose layers have widths of their own: their config, and the class that builds and saves them."""

from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from efficientllm.space.dims import Shape, in_layer, layer_of, widths

MODULE, PREFIX = "modeling_per_layer", "PerLayer"  # the file beside the weights, and the prefix of its classes' names
# Their configs, and any with longrope, read the number of heads of the whole model where layers have their own
# (transformers 5.23). They are let read the widest layer's; a stock class built from it does not fit the weights, and
# says so.
READ_ONE_WIDTH = ("llama", "gemma2", "gemma3_text", "phi3")
ALLOWANCE = "allow_global_per_layer_attribute_access"


def model_class(config: Any) -> Any:
    """Returns the class that builds the model of a config; None for a family without a table in space/families.py."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not config.is_heterogeneous:
        return stock
    from efficientllm.models import modeling_per_layer  # imports every family

    return getattr(modeling_per_layer, PREFIX + stock.__name__, None)


def set_widths_(config: Any, shape: Shape, head_dim: int) -> None:
    """Writes a shape into a config: one width for all layers, or the widest and each layer's own beside it."""
    make_uniform_(config)
    sizes: dict[str, Any] = widths(shape)
    per_layer = {name: size for name, size in sizes.items() if isinstance(size, list)}
    for name, size in {**sizes, "head_dim": head_dim}.items():
        setattr(config, name, max(size) if name in per_layer else size)
    if per_layer:
        config.per_layer_config = {
            layer: {name: each[layer] for name, each in per_layer.items()} for layer in range(config.num_hidden_layers)
        }
        if config.model_type in READ_ONE_WIDTH or "longrope" in str(config.rope_parameters):
            setattr(config, ALLOWANCE, True)


def make_uniform_(config: Any) -> None:
    """Makes a config that of a model whose layers are alike; nothing stays of what others needed."""
    config.per_layer_config = None
    config.__dict__.pop(ALLOWANCE, None)
    if MODULE in str(config.__dict__.get("auto_map")):
        del config.auto_map


def resize_modules_(model: nn.Module, shape: Shape) -> None:
    """Writes a shape into what modules copied from the config, by its names there."""
    for name, module in model.named_modules():
        layer = layer_of(name)
        sizes: dict[str, Any] = {"hidden_size": shape["hidden"]}
        if layer is not None:
            own = in_layer(shape, layer)
            sizes |= {**widths(own), "num_heads": own["kv"] * own["query"], "num_key_value_groups": own["query"]}
        for word, size in sizes.items():
            if isinstance(getattr(module, word, None), int):
                setattr(module, word, size)


def follow_config_(model: Any) -> None:
    """Gives a model whose layers differ, or did, the class that builds its config, and each layer its own config.

    So it is saved as what can be loaded. A class of somebody's own stays.
    """
    was = type(model)
    if not (model.config.is_heterogeneous or was.__name__.startswith(PREFIX)):
        return
    from efficientllm.models.modeling_per_layer import share_config

    share_config(model)
    fitting = model_class(model.config)
    if fitting is not None and was.__name__.removeprefix(PREFIX) == fitting.__name__.removeprefix(PREFIX):
        model.__class__ = fitting
