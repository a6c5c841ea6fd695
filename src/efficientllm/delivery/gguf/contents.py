"""What a GGUF file is to hold, from the model without weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from efficientllm.delivery.gguf.architecture import Value, hyper_parameters
from efficientllm.delivery.gguf.file import Contents
from efficientllm.delivery.gguf.tensors import pieces, rope_scaling
from efficientllm.delivery.gguf.tokenizer import tokenizer_metadata
from efficientllm.delivery.gguf.types import TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_contents(
    title: str, empty: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", type: str, architecture: str
) -> Contents:
    """Returns all that the file of a model under one of llama.cpp's architectures holds.

    Raises:
        UnsupportedModelError: llama.cpp has no room for a tensor or the tokenizer.
    """
    config = empty.config
    scaling, extra = rope_scaling(config, architecture)
    values: dict[str, Value] = {
        "general.type": "model",
        "general.name": title,
        "general.file_type": int(TYPES[type][1]),
        "general.quantization_version": 2,
        **hyper_parameters(config, architecture),
        **scaling,
        **tokenizer_metadata(tokenizer, config.vocab_size),
    }
    return Contents(architecture, values, {piece.name: piece for piece in pieces(empty, architecture)}, extra)


def title(model: str) -> str:
    """Returns what a model is called in the file: its folder's name, the run's if that is "model"."""
    path = Path(model).absolute()
    return path.parent.name if path.name == "model" else path.name
