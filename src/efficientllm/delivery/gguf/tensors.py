"""A model's weights as GGUF tensors and back: names, order of rows, Gemma's shifted norms, rotary factors.

A `Piece` is one GGUF tensor and the part of a parameter that it holds; `stored` and `restored` are each other's
inverse, so a written file can be compared with the model it came from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from efficientllm.delivery.gguf.architecture import ARCHITECTURES, Value, head_dim, query_scale, rope_parameters
from efficientllm.errors import UnsupportedModelError
from efficientllm.space.dims import layer_of

Array = NDArray[Any]


@dataclass(frozen=True)
class Piece:
    """One GGUF tensor: rows [start, stop) of a parameter, reordered and scaled as llama.cpp wants them.

    Attributes:
        name, param: its name in the file and in the model.
        shape: as torch has it, rows first.
        heads: how many heads' rows are reordered (see `permute`); 0 leaves them.
        shift: added first: Gemma's norms multiply by one more than their weight.
        scale: multiplied last (see `query_scale`).
    """

    name: str
    param: str
    shape: tuple[int, ...]
    start: int = 0
    heads: int = 0
    shift: float = 0.0
    scale: float = 1.0

    def stored(self, weight: Tensor) -> Array:
        """Returns what the file holds, in float32."""
        part = weight[self.start : self.start + self.shape[0]].detach().float()
        part = permute(part, self.heads) if self.heads else part
        array: Array = ((part + self.shift) * self.scale).contiguous().numpy()
        return array

    def restored(self, array: Array) -> Tensor:
        """Returns the part of the parameter that a stored float32 array stands for."""
        part = torch.from_numpy(np.array(array, np.float32)).reshape(self.shape) / self.scale - self.shift
        return unpermute(part, self.heads) if self.heads else part

    def original(self, weight: Tensor) -> Tensor:
        return weight[self.start : self.start + self.shape[0]].detach().float()


def permute(rows: Tensor, heads: int) -> Tensor:
    """Returns rows with each rotary pair made neighbours: (first half, second half) to (0, d/2, 1, d/2 + 1, …)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """Returns rows in transformers' order again."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def biases(model: nn.Module) -> set[str]:
    """Returns the projections that have a bias, such as "q_proj"."""
    return {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("_proj.bias")}


def pieces(model: Any, name: str) -> list[Piece]:
    """Returns all GGUF tensors of a model under the architecture `name`, in the model's order.

    Raises:
        UnsupportedModelError: a parameter has no place there.
    """
    architecture = ARCHITECTURES[name]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    scaled = "q_norm" if name == "gemma3" else "q_proj"
    found = []
    for param, weight in model.named_parameters():
        config = _layer_config(param, model.config)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for hf_name, start, rows in _split(param, weight, config, fused=name == "phi3"):
            stored = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            if stored is None:
                raise UnsupportedModelError(f"GGUF: architecture {name} has no tensor for '{hf_name}'")
            kind = hf_name.split(".")[-2]
            piece = Piece(
                stored,
                param,
                (rows, *weight.shape[1:]),
                start,
                heads=heads.get(kind, 0) if architecture.permuted else 0,
                shift=1.0 if name.startswith("gemma") and kind.endswith("norm") else 0.0,
                scale=query_scale(config, name) if kind == scaled else 1.0,
            )
            found.append(piece)
            if name == "olmo2" and config.tie_word_embeddings and kind == "embed_tokens":
                found.append(Piece("output.weight", param, piece.shape))  # this graph has no tied head
    return found


def _layer_config(param: str, config: Any) -> Any:
    """Returns the config of the layer that a parameter is in, the first layer's for those outside."""
    return config.per_layer_config[layer_of(param) or 0]


def _split(param: str, weight: Tensor, config: Any, fused: bool) -> Iterator[tuple[str, int, int]]:
    """Yields (name, first row, rows) of a parameter; Phi-3's fused ones in parts where the architecture has none."""
    query, key = config.num_attention_heads * head_dim(config), config.num_key_value_heads * head_dim(config)
    parts = {
        "qkv_proj": (("q_proj", query), ("k_proj", key), ("v_proj", key)),
        "gate_up_proj": (("gate_proj", weight.shape[0] // 2), ("up_proj", weight.shape[0] // 2)),
    }
    kind = param.split(".")[-2]
    start = 0
    for part, rows in () if fused else parts.get(kind, ()):
        yield param.replace(kind, part), start, rows
        start += rows
    if not start:
        yield param, 0, weight.shape[0]


def rope_scaling(config: Any, name: str) -> tuple[dict[str, Value], dict[str, Array]]:
    """Returns metadata and extra tensors of the model's rotary scaling; frequencies are transformers' own."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    layer_type = "full_attention" if "full_attention" in config.rope_parameters else None
    values: dict[str, Value] = {}
    tensors: dict[str, Array] = {}
    if kind == "default":
        return values, tensors
    any_layer = config.per_layer_config[0]  # they read a number of heads, and make nothing of it
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](any_layer, torch.device("cpu"), layer_type=layer_type)
    if kind == "llama3":
        rotated = head_dim(config)
        plain = rope["rope_theta"] ** -(torch.arange(0, rotated, 2).float() / rotated)
        tensors["rope_freqs.weight"] = (plain / frequencies).numpy()
    else:
        values |= {"type": kind}
    if kind in ("linear", "yarn"):
        values |= {"factor": float(rope.get("factor") or config.max_position_embeddings / _trained_length(config))}
    if kind == "yarn":
        factor = values["factor"]
        assert isinstance(factor, float)
        values |= {
            "original_context_length": _trained_length(config),
            "yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "yarn_beta_slow": float(rope.get("beta_slow") or 1),
            # the runtime multiplies by 0.1 ln(factor) + 1 of itself
            "attn_factor": float(attention_factor / (0.1 * np.log(max(factor, 1.0)) + 1)),
        }
    if kind == "longrope":
        values |= {"original_context_length": _trained_length(config), "attn_factor": float(attention_factor)}
        tensors |= {
            f"rope_factors_{part}.weight": np.array(rope[f"{part}_factor"], np.float32) for part in ("long", "short")
        }
    return {f"{name}.rope.scaling.{key}": value for key, value in values.items()}, tensors


def _trained_length(config: Any) -> int:
    """Returns the context that the model was trained with, before its positions were scaled."""
    found = rope_parameters(config).get("original_max_position_embeddings")
    return int(found or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)
