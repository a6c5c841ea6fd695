"""Shapes that a run takes over or starts with: another run's (`--shape-of`), and the source with fewer layers."""

from pathlib import Path
from typing import Any

from efficientllm.config.run_config import RunConfig
from efficientllm.errors import BudgetError, ConfigError
from efficientllm.models.load import load_config, open_space
from efficientllm.numbers import counted
from efficientllm.space import Limits, Space
from efficientllm.space.dims import KINDS, Shape

LAYER_LISTS = ("layer_types", "no_rope_layers")  # lists in a config with an entry a layer


def start_config(config: RunConfig) -> Any:
    """Returns the transformers config of the model that training starts with: the source's, but for two methods.

    Raises:
        UnsupportedModelError, ConfigError, BudgetError: as `load_config`, `other_config` and `num_layers_left`.
    """
    source = load_config(config.model, config.trust_remote_code)
    if config.method == "scratch":
        return other_config(config, source.vocab_size)
    if config.method == "depth" and config.target_params is not None:
        return with_layers(source, range(num_layers_left(config, source)))
    return source


def other_config(config: RunConfig, vocab_size: int) -> Any:
    """Returns the config of the model that `--shape-of` names: a run's result, or a model folder with config.json.

    Raises:
        ConfigError: a run without a result, or another vocabulary than the source's.
    """
    assert config.shape_of is not None
    folder = Path(config.shape_of).expanduser()
    result = folder / "model"
    if (folder / "config.yaml").is_file() and not (result / "config.json").is_file():
        raise ConfigError(
            f"--shape-of {config.shape_of}: that run has no result yet; finish it before you start this one"
        )
    other = load_config(str(result) if result.is_dir() else config.shape_of, config.trust_remote_code)
    if other.vocab_size != vocab_size:
        raise ConfigError(
            f"--shape-of {config.shape_of}: its vocabulary has {other.vocab_size} tokens, but that of "
            f"{config.model} has {vocab_size}; name a shape with the same vocabulary"
        )
    return other


def goal_shape(config: RunConfig, space: Space, limits: Limits) -> Shape:
    """Returns the shape that `--shape-of` names, as one that units of this source can be removed to.

    Raises:
        ConfigError: it has more of anything than the source, another depth or head size, or is not legal here.
    """
    found, of = other_config(config, space.vocab_size), f"--shape-of {config.shape_of}"
    if found.is_heterogeneous:
        raise ConfigError(
            f"{of}: its layers differ in width, but one-shot pruning leaves all layers alike; name a shape with "
            "uniform layers"
        )
    other = open_space(found, str(config.shape_of))
    goal, source = other.shape, limits.source
    for name, theirs, ours in (
        ("number of layers", other.num_layers, space.num_layers),
        ("head size", other.head_dim, space.head_dim),
    ):
        if theirs != ours:
            raise ConfigError(f"{of}: its {name} is {theirs}, but the source's is {ours}; only widths may differ")
    for kind in KINDS:
        legal = limits.legal_sizes(kind, source[kind])
        if goal[kind] not in legal:
            raise ConfigError(
                f"{of}: {kind} {goal[kind]} cannot be reached from the source's {source[kind]} (legal: multiples "
                f"of {limits.tile[kind]}, at least {limits.floor[kind]}); lower --round-to or a floor"
            )
    return goal


def num_layers_left(config: RunConfig, source: Any) -> int:
    """Returns how many layers of a source hold at most `--target-params` parameters.

    Raises:
        BudgetError: not even one does, or the target is above the source.
    """
    target, depth = config.target_params, source.num_hidden_layers
    assert target is not None
    one, two = (_num_params(with_layers(source, range(depth)[:layers]), config.model) for layers in (1, 2))
    whole = one + (depth - 1) * (two - one) if depth > 1 else one
    if target > whole or target < one:
        raise BudgetError(
            f"--target-params {target:,}: --method depth can reach {one:,} (one layer) to {whole:,} parameters (all "
            f"{counted(depth, 'layer')}) of {config.model}; give a size in that range"
        )
    return 1 + (target - one) // (two - one) if depth > 1 else 1


def with_layers(config: Any, layers: Any) -> Any:
    """Returns a config with the layers of these indices alone."""
    changed = type(config).from_dict(config.to_dict())
    changed._attn_implementation = config._attn_implementation
    for name in LAYER_LISTS:
        if getattr(config, name, None):
            setattr(changed, name, [getattr(config, name)[index] for index in layers])
    changed.num_hidden_layers = len(layers)
    return changed


def _num_params(config: Any, model: str) -> int:
    space = open_space(config, model)
    return space.num_params(space.shape)
