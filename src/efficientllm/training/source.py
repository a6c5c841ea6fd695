"""What is known of the source model before its weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from efficientllm.delivery.load import empty_model, find_model, load_config, load_tokenizer
from efficientllm.errors import ConfigError
from efficientllm.space import Limits, Space, find_limits, find_space
from efficientllm.space.limits import check_target
from efficientllm.training.config import RunConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """What is known of the source model without its weights."""

    path: Path
    space: Space
    limits: Limits
    dtype: torch.dtype
    family: str
    tokenizer: "PreTrainedTokenizerBase"


def open_space(config: RunConfig) -> tuple["PretrainedConfig", Space, Limits]:
    """Returns the source's config, space and limits, with the targets checked; needs nothing but config.json.

    Raises:
        UnsupportedModelError, BudgetError: as `load_config`, `find_space`, `find_limits` and `check_target`.
    """
    model_config = load_config(config.model, config.trust_remote_code)
    space = find_space(empty_model(model_config, config.model))
    limits = find_limits(
        space,
        model_config,
        round_to=config.round_to,
        min_ffn=config.min_ffn,
        min_hidden=config.min_hidden,
        min_kv=config.min_kv,
    )
    check_target(space, limits, config.target_params or 0)
    for size in config.save_at:
        check_target(space, limits, size, "--save-at")
    if config.seq_len > getattr(model_config, "max_position_embeddings", config.seq_len):
        raise ConfigError(
            f"--seq-len {config.seq_len} is above the model's max_position_embeddings "
            f"{model_config.max_position_embeddings}; lower it"
        )
    return model_config, space, limits


def open_source(config: RunConfig) -> Source:
    """Returns what `open_space` does with the tokenizer and the result's dtype; reads no weights.

    Raises:
        UnsupportedModelError, BudgetError: as `open_space` and `load_tokenizer`.
    """
    model_config, space, limits = open_space(config)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    stored = getattr(model_config, "dtype", None)
    dtype = DTYPES[config.dtype] if config.dtype else stored if isinstance(stored, torch.dtype) else torch.float32
    path = find_model(config.model, weights=config.init == "pretrained")
    return Source(path, space, limits, dtype, model_config.model_type, tokenizer)
