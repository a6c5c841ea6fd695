"""`efficientllm inspect`: the pruning space of a model as a table, from its config.json alone."""

import sys
from typing import TYPE_CHECKING

from efficientllm.errors import UnsupportedModelError
from efficientllm.numbers import format_count
from efficientllm.space import Limits, Space, find_limits, find_space

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from transformers import PretrainedConfig, PreTrainedModel

SEQ_LEN = 2048  # tokens of a row that the FLOPs are given for, the default of --seq-len
UNITS = {
    "hidden": "a hidden dimension",
    "ffn": "an FFN channel a layer",
    "kv": "a KV group a layer",
    "query": "a query head a KV group",
}


def print_space(
    model: str,
    *,
    round_to: int | None,
    min_ffn: int | None,
    min_hidden: int | None,
    min_kv: int | None,
    trust_remote_code: bool,
) -> int:
    """Prints what can be removed from a model, what it costs, and how far down it goes; loads no weights.

    Raises:
        UnsupportedModelError: the model cannot be read or pruned.
        BudgetError: a floor or multiple below 1.
    """
    from efficientllm.delivery.load import load_config

    config = load_config(model, trust_remote_code)
    space = find_space(empty_model(config, model, trust_remote_code))
    limits = find_limits(space, config, round_to=round_to, min_ffn=min_ffn, min_hidden=min_hidden, min_kv=min_kv)
    console = _console()
    for line in source_lines(model, config, space):
        console.print(line, markup=False)
    console.print(space_table(space, limits))
    for line in limit_lines(space, limits):
        console.print(line, markup=False)
    return 0


def empty_model(config: "PretrainedConfig", model: str, trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model of a config on the meta device: names and shapes of its parameters, no memory.

    Raises:
        UnsupportedModelError: the sizes in the config contradict each other.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return, no-untyped-call]
                config, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises whatever its parts raise
        reason = str(error).strip() or type(error).__name__
        raise UnsupportedModelError(
            f"model {model}: cannot be built from its config ({reason.splitlines()[0]}); check config.json"
        ) from None


def source_lines(model: str, config: "PretrainedConfig", space: Space) -> list[str]:
    """What the model is: its family, parameters (tied ones once), bytes and training FLOPs."""
    import torch

    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    stored = str(dtype).removeprefix("torch.")
    num_params = space.num_params(space.shape)
    head = "tied to the embedding" if space.tied else "its own"
    flops = space.flops_per_token(space.shape, SEQ_LEN)
    return [
        f"{model}: {config.model_type}, {space.num_layers} layers, heads of {space.head_dim}, "
        f"vocabulary {space.vocab_size:,}, output head {head}",
        f"{num_params:,} parameters, {format_count(num_params * dtype.itemsize)}B in {stored}",
        f"{format_count(flops)} training FLOPs per token in rows of {SEQ_LEN:,}",
    ]


def space_table(space: Space, limits: Limits) -> "Table":
    """A row per kind: its unit, in how many dims at once, how many, what each holds, and the legal sizes."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (
        ("kind", "left"),
        ("unit", "left"),
        ("dims", "right"),
        ("units", "right"),
        ("params a unit", "right"),
        ("multiples of", "right"),
        ("least", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for kind, bundle in space.bundles.items():
        frozen = limits.floor[kind] == bundle.size
        table.add_row(
            kind,
            UNITS[kind],
            f"{len(bundle.dims):,}",
            f"{bundle.size:,}",
            f"{params_per_unit(space, kind):,}",
            "frozen" if frozen else f"{limits.tile[kind]:,}",
            f"{limits.floor[kind]:,}",
            style="dim" if frozen else None,
        )
    return table


def params_per_unit(space: Space, kind: str) -> int:
    """Parameters that go with one unit of every dim of a kind, at the shape the model has."""
    smaller = space.shape | {kind: space.shape[kind] - 1}
    return space.num_params(space.shape) - space.num_params(smaller)


def limit_lines(space: Space, limits: Limits) -> list[str]:
    """How far down pruning can go, and why a kind is frozen or goes in other steps than asked."""
    least, source = space.num_params(limits.floor), space.num_params(space.shape)
    floors = ", ".join(f"{kind} {size:,}" for kind, size in limits.floor.items())
    lines = [f"smallest reachable size {least:,} parameters, {least / source:.1%} of the source ({floors})"]
    for kind, size in space.shape.items():
        if note := limits.notes.get(kind) or _why_frozen(kind, size, limits):
            lines.append(f"{kind}: {note}")
    return lines


def _why_frozen(kind: str, size: int, limits: Limits) -> str | None:
    if limits.floor[kind] < size:
        return None
    if kind == "query" and size == 1:
        return "one query head in every KV group already"
    if size <= limits.tile[kind]:
        return f"{size} is the only legal size, others are multiples of {limits.tile[kind]}"
    return f"the floor leaves no legal size (multiples of {limits.tile[kind]}) below {size}"


def _console() -> "Console":
    """The terminal at its width; a file or pipe is wide, so that no line of it is broken."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 240)
