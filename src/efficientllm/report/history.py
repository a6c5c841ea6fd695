"""History: what a run folder says about its run, for everything that shows runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from efficientllm.errors import ConfigError, EfficientLLMError
from efficientllm.pruning.trajectory import physical
from efficientllm.space import Limits, Space, find_limits, find_space
from efficientllm.space.dims import Shape
from efficientllm.training.budget import rounding
from efficientllm.training.config import RunConfig, load_yaml, to_dict
from efficientllm.training.logs import read_rows
from efficientllm.training.source import floors


@dataclass(frozen=True)
class History:
    """A run as its folder tells it; everything by row has an entry for each of `rows`, the first being the source.

    Attributes:
        config: every flag of the run with its value.
        rows, removals: metrics.jsonl and removals.jsonl.
        finished: whether it has its result, RUN/model.
        source_params, params: parameters of the source, and of the last row.
        shapes: units left of each kind, by row.
        tokens: of the last row.
        seconds: of the training steps; validation, checkpoints and what lay between two starts are left out.
        flops: of all steps up to a row, by row; None where no config of the model is found. They are those that the
            model needs, not what activation checkpointing computes twice.
    """

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    removals: list[dict[str, Any]]
    finished: bool
    source_params: int
    params: int
    shapes: list[Shape]
    tokens: int
    seconds: float
    flops: list[float] | None

    @property
    def valid_losses(self) -> list[tuple[int, float]]:
        """(tokens, validation loss) of every validation, the source's first."""
        return [(row["tokens"], row["valid_loss"]) for row in self.rows if "valid_loss" in row]


def read_run(folder: str | Path) -> History:
    """Returns the history of a run, finished or not; reads no weights.

    Raises:
        ConfigError: no run folder, a broken config.yaml, or a run that has not begun.
    """
    path = Path(folder).expanduser()
    missing = [name for name in ("config.yaml", "metrics.jsonl") if not (path / name).is_file()]
    if missing:
        found = f"it holds no {' and no '.join(missing)}" if path.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: no run folder ({found}); name the --out of a prune")
    config = load_yaml(path / "config.yaml")
    rows = read_rows(path / "metrics.jsonl")
    if not rows:
        raise ConfigError(f"{folder}: the run has not begun, its metrics.jsonl is empty; finish it with prune --resume")
    shapes = [shape_of(row) for row in rows]
    return History(
        folder=path,
        config=to_dict(config),
        rows=rows,
        removals=read_rows(path / "removals.jsonl"),
        finished=(path / "model" / "config.json").is_file(),
        source_params=rows[0]["params"],
        params=rows[-1]["params"],
        shapes=shapes,
        tokens=rows[-1]["tokens"],
        seconds=sum(
            (after["tokens"] - before["tokens"]) / after["tokens_per_second"]
            for before, after in pairwise(rows)
            if after["tokens_per_second"]
        ),
        flops=_flops(path, config, [row["tokens"] for row in rows], shapes),
    )


def shape_of(row: Mapping[str, Any]) -> Shape:
    """Returns the shape of a row of metrics.jsonl: units left of each kind."""
    kv = row["num_key_value_heads"]
    return {
        "hidden": row["hidden_size"],
        "ffn": row["intermediate_size"],
        "kv": kv,
        "query": row["num_attention_heads"] // kv,
    }


def training_flops(
    space: Space, limits: Limits, tokens: Sequence[int], shapes: Sequence[Shape], seq_len: int
) -> list[float]:
    """Returns the FLOPs of all steps up to each row.

    A step computes in the physical shape before its own removals: larger than the live one while units wait for a tile.
    A teacher's forward passes (`--distill`) belong here too, once there is one: they are per token as well.
    """
    steps = [
        (now - before) * space.flops_per_token(physical(shape, limits), seq_len)
        for (before, now), shape in zip(pairwise(tokens), shapes, strict=False)
    ]
    return list(accumulate(steps, initial=0.0))


def _flops(run: Path, config: RunConfig, tokens: Sequence[int], shapes: Sequence[Shape]) -> list[float] | None:
    found = _source_space(run, config, shapes[0])
    return training_flops(*found, tokens, shapes, config.seq_len) if found else None


def _source_space(run: Path, config: RunConfig, source: Shape) -> tuple[Space, Limits] | None:
    """Returns space and limits of the source, built from any config of the model that the run has kept.

    The source itself may be on another machine: the run's own models differ from it by their sizes alone.
    """
    from efficientllm.delivery.load import empty_model, load_config

    kept = [run / "model", *sorted(run.glob("checkpoints/step-*")), *sorted(run.glob("models/*"))]
    for model in [*(str(each) for each in kept if (each / "config.json").is_file()), config.model]:
        try:
            found = load_config(model, config.trust_remote_code)
            found.head_dim = getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads
            found.hidden_size, found.intermediate_size = source["hidden"], source["ffn"]
            found.num_attention_heads, found.num_key_value_heads = source["kv"] * source["query"], source["kv"]
            space = find_space(empty_model(found, model))
            limits = find_limits(space, found, round_to=rounding(config, space), **floors(config))
            return space, limits
        except EfficientLLMError:
            continue
    return None
