"""`efficientllm inspect`: the pruning space of a model as a table, from its config.json alone."""

import sys
from typing import TYPE_CHECKING

from efficientllm.numbers import format_count
from efficientllm.space import Limits, Space, find_limits
from efficientllm.space.dims import KINDS, alike, kind_of, of_kind, shape_text, size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from transformers import PretrainedConfig

SEQ_LEN = 2048  # tokens of a row that the FLOPs are given for, the default of --seq-len
UNITS = {
    "hidden": "hidden dimension",
    "ffn": "FFN channel per layer",
    "kv": "KV group per layer",
    "query": "query head per group",
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
    from efficientllm.models.load import check_prunable, load_config, open_space

    check_prunable(model)
    config = load_config(model, trust_remote_code)
    space = open_space(config, model)
    limits = find_limits(space, config, round_to=round_to, min_ffn=min_ffn, min_hidden=min_hidden, min_kv=min_kv)
    console = _console()
    for line in source_lines(model, config, space):
        console.print(line, markup=False)
    console.print("", space_table(space, limits), "", sep="\n")
    for line in limit_lines(space, limits):
        console.print(line, markup=False)
    return 0


def source_lines(model: str, config: "PretrainedConfig", space: Space) -> list[str]:
    """What the model is: its family, parameters (tied ones once), bytes and training FLOPs."""
    import torch

    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    stored = str(dtype).removeprefix("torch.")
    num_params = space.num_params(space.shape)
    head = "tied output head" if space.tied else "untied output head"
    flops = space.flops_per_token(space.shape, SEQ_LEN)
    return [
        model,
        f"  {config.model_type}, {space.num_layers} layers, head size {space.head_dim}, "
        f"vocabulary {space.vocab_size:,}, {head}",
        f"  {num_params:,} parameters, {format_bytes(num_params * dtype.itemsize)} in {stored}",
        f"  {format_count(flops)} training FLOPs per token, in rows of {SEQ_LEN:,} tokens",
    ]


def format_bytes(value: float) -> str:
    """Returns a number of bytes with one digit behind the point: 35.8 kB, 269.0 MB, 13.5 GB."""
    unit, size = ("GB", 1e9) if value >= 1e9 else ("MB", 1e6) if value >= 1e6 else ("kB", 1e3)
    return f"{value / size:.1f} {unit}"


def space_table(space: Space, limits: Limits) -> "Table":
    """A row per kind: its unit, in how many dims at once, how many, what each holds, and the legal sizes."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, justify in (
        ("kind", "left"),
        ("unit", "left"),
        ("dims", "right"),
        ("units", "right"),
        ("params/unit", "right"),
        ("multiple", "right"),
        ("least", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for kind in KINDS:
        sizes, floors = of_kind(space.shape, kind), of_kind(limits.floor, kind)
        frozen = floors == sizes
        table.add_row(
            kind,
            UNITS[kind],
            f"{sum(len(space.bundles[name].dims) for name in sizes):,}",
            size_text(alike(list(sizes.values()))),
            f"{params_per_unit(space, kind):,}",
            "frozen" if frozen else f"{max(of_kind(limits.tile, kind).values()):,}",
            size_text(alike(list(floors.values()))),
            style="dim" if frozen else None,
        )
    return table


def params_per_unit(space: Space, kind: str) -> int:
    """Parameters that go with one unit of every dim of a kind, at the shape the model has."""
    smaller = space.shape | {name: size - 1 for name, size in of_kind(space.shape, kind).items()}
    return space.num_params(space.shape) - space.num_params(smaller)


def limit_lines(space: Space, limits: Limits) -> list[str]:
    """How far down pruning can go, and why a kind is frozen or goes in other steps than asked."""
    least, source = space.num_params(limits.floor), space.num_params(space.shape)
    kinds: dict[str, list[str]] = {}  # by note: what freezes the heads often freezes both kinds of them
    for name, size in space.shape.items():
        if (note := limits.notes.get(kind_of(name)) or _why_frozen(name, size, limits)) and name not in kinds:
            kinds.setdefault(note, []).append(name)
    return [
        "smallest reachable size",
        f"  {least:,} parameters, {least / source:.1%} of the source: {shape_text(limits.floor)}",
        *(f"{', '.join(names)}: {note}" for note, names in kinds.items()),
    ]


def _why_frozen(bundle: str, size: int, limits: Limits) -> str | None:
    if limits.floor[bundle] < size:
        return None
    if size == 1:
        return f"only one {UNITS[kind_of(bundle)]} is left, and layers are never emptied"
    if size <= limits.tile[bundle]:
        return f"{size} is the only legal size; others are multiples of {limits.tile[bundle]}"
    return f"the floor leaves no legal size (multiples of {limits.tile[bundle]}) below {size}"


def _console() -> "Console":
    """The terminal at its width; a file or pipe is wide, so that no line of it is broken."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 240)
