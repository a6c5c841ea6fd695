"""What is known of the source model before its weights are read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from efficientllm.baselines.shapes import goal_shape, start_config
from efficientllm.config.methods import METHODS
from efficientllm.config.run_config import RunConfig
from efficientllm.delivery.huggingface import DTYPES
from efficientllm.errors import ConfigError
from efficientllm.models.load import empty_model, find_model, load_config, load_tokenizer, open_space
from efficientllm.space import Limits, Space, find_limits, find_space
from efficientllm.space.limits import check_target
from efficientllm.training.size_target import Budget, open_budget, rounding
from efficientllm.training.teacher import open_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SourceModel:
    """What is known of the source model without its weights.

    Attributes:
        num_params: of the model that is named.
        space, limits: of the model that training starts with, which for two methods is a smaller one.
    """

    path: Path
    num_params: int
    space: Space
    limits: Limits
    budget: Budget
    dtype: torch.dtype
    family: str
    tokenizer: "PreTrainedTokenizerBase"
    teacher: Space | None  # of `--distill`


def open_start(config: RunConfig) -> tuple["PreTrainedModel", Space, Limits]:
    """Returns the model that training starts with on the meta device, its space and limits; targets are checked.

    Needs nothing but config.json.

    Raises:
        UnsupportedModelError, BudgetError: as `load_config`, `find_space`, `find_limits` and `check_target`.
    """
    model_config = start_config(config)
    empty = empty_model(model_config, config.model)
    space = find_space(empty, config.layout == "per-layer")
    limits = find_limits(space, model_config, round_to=rounding(config, space), **floors(config))
    if config.target_bytes is None and config.shape_of is None and config.method != "depth":
        check_target(space, limits, config.target_params or 0)
    for size in config.save_at:
        check_target(space, limits, size, "--save-at")
    if config.seq_len > getattr(model_config, "max_position_embeddings", config.seq_len):
        raise ConfigError(
            f"--seq-len {config.seq_len} is above the model's max_position_embeddings "
            f"{model_config.max_position_embeddings}; lower it"
        )
    return empty, space, limits


def floors(config: RunConfig) -> dict[str, int | None]:
    """Returns the floors that a config asks for, as `find_limits` takes them."""
    return {name: getattr(config, name) for name in ("min_ffn", "min_hidden", "min_kv")}


def open_source(config: RunConfig) -> SourceModel:
    """Returns what `open_start` does with budget, tokenizer, the result's dtype and the teacher; reads no weights.

    Raises:
        UnsupportedModelError, BudgetError, ConfigError: as `open_start`, `load_tokenizer`, `open_budget` and
            `open_teacher`.
    """
    empty, space, limits = open_start(config)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    budget = open_budget(config, empty, space, limits, tokenizer)
    whole = space
    if METHODS[config.method].when == "initial":
        budget = replace(budget, target=space.num_params(limits.source))
        source = load_config(config.model, config.trust_remote_code)
        whole = open_space(source, config.model)
    elif config.shape_of is not None:
        goal = goal_shape(config, space, limits)
        budget = replace(budget, target=space.num_params(goal), goal=goal)
    stored = getattr(empty.config, "dtype", None)
    dtype = DTYPES[config.dtype] if config.dtype else stored if isinstance(stored, torch.dtype) else torch.float32
    teacher = open_teacher(config, whole, tokenizer)
    path = find_model(config.model, weights=config.init == "pretrained" and config.method != "scratch")
    return SourceModel(
        path, whole.num_params(whole.shape), space, limits, budget, dtype, empty.config.model_type, tokenizer, teacher
    )
