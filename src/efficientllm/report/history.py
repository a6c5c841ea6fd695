"""History: what a run folder says about its run, for everything that shows runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from efficientllm.config.methods import METHODS
from efficientllm.config.run_config import SOURCE, RunConfig, load_yaml, to_dict
from efficientllm.errors import ConfigError, EfficientLLMError
from efficientllm.models.heterogeneous import set_widths_
from efficientllm.pruning.trajectory import physical
from efficientllm.run.logs import read_rows
from efficientllm.run.source import floors
from efficientllm.space import Limits, Space, find_limits, find_space
from efficientllm.space.dims import Shape
from efficientllm.training.size_target import rounding
from efficientllm.training.teacher import pass_flops, teacher_name


@dataclass(frozen=True)
class History:
    """A run as its folder tells it; everything by row has an entry for each of `rows`, the first being the source.

    With `--method scratch` the first is the model with fresh weights.

    Attributes:
        config: every flag of the run with its value.
        rows, removals: metrics.jsonl and removals.jsonl.
        finished: whether it has its result, RUN/model.
        source_params, params: parameters of the source, and of the last row.
        tokens: of the last row.
        seconds: of the training steps; validation, checkpoints and what lay between two starts are left out.
        flops: of all steps up to a row, a teacher's included, by row; None where no config of the model (or of the
            teacher) is found. They are those that the model needs, not what activation checkpointing computes twice.
        source_flops: of as many tokens with the source, alone; None as well where training began with another model.
    """

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    removals: list[dict[str, Any]]
    finished: bool
    source_params: int
    params: int
    tokens: int
    seconds: float
    flops: list[float] | None
    source_flops: float | None

    @property
    def valid_losses(self) -> list[tuple[int, float]]:
        """(tokens, validation loss) of every validation, the source's first."""
        return [(row["tokens"], row["valid_loss"]) for row in self.rows if "valid_loss" in row]


def read_run(folder: str | Path) -> History:
    """Returns the history of a run, finished or not; reads no weights.

    Raises:
        ConfigError: not a run folder, a broken config.yaml, or a run that has not started.
    """
    path = Path(folder).expanduser()
    missing = [name for name in ("config.yaml", "metrics.jsonl") if not (path / name).is_file()]
    if missing:
        found = f"it holds no {' and no '.join(missing)}" if path.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: not a run folder ({found}); name the --out of a prune run")
    config = load_yaml(path / "config.yaml")
    rows = read_rows(path / "metrics.jsonl")
    if not rows:
        raise ConfigError(
            f"{folder}: the run has not started (its metrics.jsonl is empty); finish it with prune --resume"
        )
    flops = _flops(path, config, rows)
    return History(
        folder=path,
        config=to_dict(config),
        rows=rows,
        removals=read_rows(path / "removals.jsonl"),
        finished=(path / "model" / "config.json").is_file(),
        source_params=rows[0]["params"],
        params=rows[-1]["params"],
        tokens=rows[-1]["tokens"],
        seconds=sum(
            (after["tokens"] - before["tokens"]) / after["tokens_per_second"]
            for before, after in pairwise(rows)
            if after["tokens_per_second"]
        ),
        flops=flops[0] if flops else None,
        source_flops=flops[1] if flops else None,
    )


def shape_of(row: Mapping[str, Any], layers: int | None = None) -> Shape:
    """Returns the shape of a row of metrics.jsonl: units left of each kind, or with `layers` of each layer's."""
    heads, kv, ffn = (row[name] for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
    if layers is None:
        return {"hidden": row["hidden_size"], "ffn": ffn, "kv": kv, "query": heads // kv}
    each = [size if isinstance(size, list) else [size] * layers for size in (ffn, kv, heads)]
    sizes = {
        "ffn": each[0],
        "kv": each[1],
        "query": [all // groups for all, groups in zip(each[2], each[1], strict=True)],
    }
    by_layer = {f"layers.{layer}.{kind}": size for kind, all in sizes.items() for layer, size in enumerate(all)}
    return {"hidden": row["hidden_size"], **by_layer}


def step_shapes(shapes: Sequence[Shape], params: Sequence[int], config: RunConfig, limits: Limits) -> list[Shape]:
    """Returns the shape that each step computes in, from the shape and the parameters of each row.

    It is the one before the step's own removals, and larger while units wait for a tile. What goes at once is gone
    before the first step, and masks wait until the model has the size of the target or of a `--save-at`.
    """
    method = METHODS[config.method]
    if method.when != "gradual":
        return list(shapes[1:])
    if method.compacts:
        return [physical(shape, limits) for shape in shapes[:-1]]
    sizes = [*config.save_at, *([config.target_params] if config.target_params else [])]
    computed, last = [], shapes[0]
    for (before, now), shape in zip(pairwise(params), shapes[1:], strict=True):
        computed.append(last)
        if any(now <= size < before for size in sizes):
            last = shape
    return computed


def training_flops(
    space: Space, tokens: Sequence[int], computed: Sequence[Shape], seq_len: int, teaching: float = 0.0
) -> list[float]:
    """Returns the FLOPs of all steps up to each row.

    Args:
        tokens: up to each row.
        computed: the shape of each step.
        teaching: FLOPs of a token in a teacher's forward pass.
    """
    steps = [
        (now - before) * (space.flops_per_token(shape, seq_len) + teaching)
        for (before, now), shape in zip(pairwise(tokens), computed, strict=True)
    ]
    return list(accumulate(steps, initial=0.0))


def _flops(run: Path, config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], float | None] | None:
    """Returns the FLOPs of all steps up to each row, and those of the source over as many tokens."""
    found = _first_space(run, config, rows[0 if METHODS[config.method].when != "initial" or len(rows) < 2 else 1])
    if found is None:
        return None
    space, limits = found
    layers = space.num_layers if space.per_layer else None
    shapes, tokens = [shape_of(row, layers) for row in rows], [row["tokens"] for row in rows]
    begun = METHODS[config.method].when == "initial"
    teaching = 0.0
    if config.distill is not None:
        teacher = space if config.distill == SOURCE and not begun else _kept_space(teacher_name(config), config)
        if teacher is None:
            return None
        teaching = pass_flops(teacher, config.seq_len)
    computed = step_shapes(shapes, [row["params"] for row in rows], config, limits)
    source = None if begun else tokens[-1] * space.flops_per_token(shapes[0], config.seq_len)
    return training_flops(space, tokens, computed, config.seq_len, teaching), source


def _kept_space(model: str, config: RunConfig) -> Space | None:
    from efficientllm.models.load import empty_model, load_config

    try:
        found = load_config(model, config.trust_remote_code)
        return find_space(empty_model(found, model), found.is_heterogeneous)
    except EfficientLLMError:
        return None


def _first_space(run: Path, config: RunConfig, first: Mapping[str, Any]) -> tuple[Space, Limits] | None:
    """Returns space and limits of the model that training begins with, from any config that the run has kept of it.

    The source itself may be on another machine: the run's own models differ from it by their sizes alone.
    """
    from efficientllm.models.load import empty_model, load_config

    kept = [run / "model", *sorted(run.glob("checkpoints/step-*")), *sorted(run.glob("models/*"))]
    for model in [*(str(each) for each in kept if (each / "config.json").is_file()), config.model]:
        try:
            found = load_config(model, config.trust_remote_code)
            own = found.per_layer_config[0]
            head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
            per_layer = config.layout == "per-layer"
            set_widths_(found, shape_of(first, found.num_hidden_layers if per_layer else None), head_dim)
            space = find_space(empty_model(found, model), per_layer)
            return space, find_limits(space, found, round_to=rounding(config, space), **floors(config))
        except EfficientLLMError:
            continue
    return None
