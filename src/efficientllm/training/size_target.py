"""Budget: what the result of a run must not exceed, in parameters or in bytes of the file that will be shipped."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from efficientllm.config.run_config import RunConfig
from efficientllm.errors import BudgetError
from efficientllm.pruning.landing import can_land
from efficientllm.space.dims import Measure, Shape, Space, of_kind, shape_text
from efficientllm.space.limits import Limits, check_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from efficientllm.delivery.gguf.size import FileSize


@dataclass(frozen=True)
class Budget:
    """What the result of a run must not exceed.

    Attributes:
        measure: parameters or bytes of a shape.
        target: the largest size that the result may have.
        file: the bytes of a shape's file of `--for`; None without it.
        remarks: what a person should know before the run starts.
        goal: the shape that the result must have, where its size alone does not say it.
    """

    measure: Measure
    target: int
    file: "FileSize | None" = None
    remarks: tuple[str, ...] = ()
    goal: Shape | None = None

    @property
    def text(self) -> str:
        """The target with its unit."""
        return f"{self.target:,} " + (f"bytes of {self.file.type}" if self.measure is self.file else "parameters")


def params_budget(config: RunConfig, space: Space, limits: Limits) -> Budget:
    """Returns the budget of a target in parameters; without one it is the source's size."""
    return Budget(space.num_params, config.target_params or space.num_params(limits.source))


def rounding(config: RunConfig, space: Space) -> int | Mapping[str, int] | None:
    """Returns what sizes are rounded to: `--round-to`, or what the rows of `--for` need, or None for the default."""
    blocks = _blocks(config, space)
    return config.round_to or (blocks if max(blocks.values()) > 1 else None)


def open_budget(
    config: RunConfig, empty: "PreTrainedModel", space: Space, limits: Limits, tokenizer: "PreTrainedTokenizerBase"
) -> Budget:
    """Returns the budget of a run.

    Args:
        empty: the source on the meta device.

    Raises:
        UnsupportedModelError: `--for`, and the model cannot be exported as GGUF.
        BudgetError: no legal shape ends within one FFN tile under `--target-bytes`, or `--round-to` cannot keep it.
    """
    if config.for_type is None:
        return params_budget(config, space, limits)
    from efficientllm.delivery.gguf.contents import title
    from efficientllm.delivery.gguf.size import FileSize

    name = title(str(Path(config.out).expanduser() / "model") if config.out else config.model)
    file = FileSize(name, empty, tokenizer, config.for_type, space, limits)
    odd = {kind: block for kind, block in _blocks(config, space).items() if config.round_to and config.round_to % block}
    found = (
        f"--round-to {config.round_to} is not a multiple of {max(odd.values(), default=1)}, the block of "
        f"{config.for_type}"
    )
    if config.target_bytes is None:
        budget = params_budget(config, space, limits)
        remark = f"{found}: {_odd_cost(file, limits)}; remove --round-to"
        return Budget(budget.measure, budget.target, file, (remark,) if odd else ())
    if odd:
        raise BudgetError(
            f"{found}: {_odd_cost(file, limits)}, and a smaller shape could have a larger file, so a target in bytes "
            "cannot be guaranteed; remove --round-to"
        )
    unit = f"bytes of {config.for_type}"
    check_target(space, limits, config.target_bytes, "--target-bytes", file, unit)
    if config.target_bytes < file(limits.source) and not can_land(limits.source, limits, file, config.target_bytes):
        raise BudgetError(
            f"--target-bytes {config.target_bytes:,}: no legal shape lies within one FFN tile below it (tiles "
            f"{shape_text(limits.tile)}; floors {shape_text(limits.floor)}); give another size, or lower a floor"
        )
    return Budget(file, config.target_bytes, file)


def _blocks(config: RunConfig, space: Space) -> dict[str, int]:
    if config.for_type is None:
        return {"": 1}
    from efficientllm.delivery.gguf.size import row_blocks

    return row_blocks(config.for_type, space.shape, space.head_dim)


def _odd_cost(file: "FileSize", limits: Limits) -> str:
    """Returns in words what rows of another length than blocks cost, one tile below the source."""
    smaller = {name: max(size - limits.tile[name], limits.floor[name]) for name, size in limits.source.items()}
    smaller |= {**of_kind(limits.source, "kv"), **of_kind(limits.source, "query")}
    bits = [8 * file.written(shape) / file.space.num_params(shape) for shape in (limits.source, smaller)]
    return f"rows of other lengths are stored in larger types, {bits[1]:.1f} bits per weight instead of {bits[0]:.1f}"
