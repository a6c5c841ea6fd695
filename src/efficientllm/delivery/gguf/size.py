"""The bytes of a GGUF file before there is one, for every shape that pruning can reach.

A tensor's type follows from its name and from what divides its columns. So tensors that share both, and whose rows and
columns grow alike, are counted once, and the size of a shape costs a few products.
"""

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

from gguf import GGML_QUANT_SIZES

from efficientllm.delivery.gguf.architecture import ARCHITECTURES, find_architecture, head_dim
from efficientllm.delivery.gguf.contents import find_contents
from efficientllm.delivery.gguf.file import Contents, header_bytes, padded
from efficientllm.delivery.gguf.tensors import Piece, biases
from efficientllm.delivery.gguf.types import TYPES, needs_llama_cpp, plan_types
from efficientllm.delivery.gguf.widening import widened_shape
from efficientllm.errors import UnsupportedModelError
from efficientllm.pruning.trajectory import physical
from efficientllm.space.dims import Measure, Shape, Space, in_layer, of_kind, widths
from efficientllm.space.limits import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DIVISORS = (256, 32, 1)  # of columns: a type depends on the first that divides them
Labels = tuple[str, ...]
Alike = tuple[Labels, Labels, tuple[tuple[int, int], ...]]  # rows, columns, (block, its bytes) by divisor


def row_blocks(type: str, source: Shape, head_dim: int) -> dict[str, int]:
    """Returns what the rows that read each kind must be multiples of to be stored in a type.

    256 for K-types, but 32 where the source's rows are shorter than that; "query" stands for O's rows.
    """
    block: int = GGML_QUANT_SIZES[TYPES[type][0]][0]
    least = [in_layer(source, layer) for layer in range(len(of_kind(source, "ffn")))]  # one for all, or each
    columns = min(layer["kv"] * layer["query"] for layer in least) * head_dim
    lengths = {"hidden": source["hidden"], "ffn": min(layer["ffn"] for layer in least), "query": columns}
    return {kind: block if length >= block else min(block, 32) for kind, length in lengths.items()}


class FileSize:
    """The bytes of a shape's file. If tiles are multiples of `row_blocks`, no larger legal shape has a smaller file.

    A shape between two legal ones is never written: its odd rows would be stored in a larger type. It counts as lying
    as far between their sizes as its parameters do between theirs, so that a pace in bytes is an even one.

    Where heads × head size is the hidden size, or layers that might differ are alike, the file may be under another of
    llama.cpp's architectures than at all other shapes; of both sizes, a few kB apart, the larger counts there.

    Args:
        title: what the file will call the model.
        empty: the source on the meta device.

    Raises:
        UnsupportedModelError: llama.cpp has no room for the source, for what may be left of it, or for its tokenizer.
    """

    def __init__(
        self,
        title: str,
        empty: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        type: str,
        space: Space,
        limits: Limits,
    ) -> None:
        self.type, self.space, self.limits = type, space, limits
        differing = find_architecture(empty.config, biases(empty), True) if space.per_layer else None
        names = {} if empty.config.is_heterogeneous else _architectures(empty, limits)
        sizes = {
            name: _sizes(find_contents(title, empty, tokenizer, type, name), type, space)
            for name in {*names.values(), *([differing] if differing else [])}
        }
        self._sizes = {square: sizes[name] for square, name in names.items()}
        self._differing = sizes[differing] if differing else None
        self._known: dict[tuple[int, ...], int] = {}

    def __call__(self, shape: Shape) -> int:
        below = self.limits.close(shape)
        if below == shape:
            return self.written(shape)
        above = physical(shape, self.limits)
        params, least, most = (self.space.num_params(each) for each in (shape, below, above))
        added = self.written(above) - self.written(below)
        return self.written(below) + added * (params - least) // (most - least)

    def written(self, shape: Shape) -> int:
        """Returns the bytes of the file that is written at this shape, legal or not."""
        key = tuple(shape.values())
        if key not in self._known:
            own = in_layer(shape, 0)
            is_square = own["hidden"] == own["kv"] * own["query"] * self.space.head_dim
            possible = [size for square, size in self._sizes.items() if is_square or not square]
            possible = possible or list(self._sizes.values())
            if self._differing:
                layers_differ = any(isinstance(size, list) for size in widths(shape).values())
                possible = [self._differing, *(() if layers_differ else possible)]
            self._known[key] = max(size(shape) for size in possible)
        return self._known[key]


def _architectures(empty: "PreTrainedModel", limits: Limits) -> dict[bool, str]:
    """Returns the architecture of shapes whose heads × head size is the hidden size, and of all others."""
    config: Any = copy.copy(empty.config)
    find_architecture(config, biases(empty))
    config.head_dim = head_dim(config)
    width = config.num_attention_heads * config.head_dim
    is_fixed = all(limits.floor[kind] == limits.source[kind] for kind in ("hidden", "kv", "query"))
    names = {}
    for square in (width == config.hidden_size,) if is_fixed else (True, False):
        config.hidden_size = width if square else width + 1
        try:
            names[square] = find_architecture(config, biases(empty))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{error}: the pruned model could not be exported; prune feed-forward channels only "
                f"(--min-hidden {limits.source['hidden']} --min-kv {limits.source['kv']})"
            ) from None
    return names


def _sizes(contents: Contents, type: str, space: Space) -> Measure:
    """Returns the function from a shape to the bytes of its file under one architecture."""
    fixed = header_bytes(contents) + sum(padded(4 * array.size) for array in contents.extra.values())
    alike = {many_groups: _count_alike(contents, type, space, many_groups) for many_groups in (False, True)}

    def measure(shape: Shape) -> int:
        if ARCHITECTURES[contents.name].widened:
            shape = widened_shape(shape, space.head_dim)
        lengths = {label: polynomial(shape) for label, polynomial in space.lengths.items()}
        total = fixed
        many_groups = contents.name == "deci" or in_layer(shape, 0)["query"] > 1
        for (rows, columns, types), count in alike[many_groups].items():
            row = sum(lengths[label] for label in columns)
            block, size = types[0 if row % 256 == 0 else 1 if row % 32 == 0 else 2]
            num_rows = sum(lengths[label] for label in rows) if rows else 1
            total += count * padded(num_rows * row // block * size)
        return total

    return measure


def _count_alike(contents: Contents, type: str, space: Space, many_groups: bool) -> Counter[Alike]:
    """Returns how many tensors there are of each kind; a vector is one row."""
    labels = [_labels(piece, space) for piece in contents.pieces.values()]
    by_divisor = [
        plan_types(
            [(name, (1, divisor)[-len(piece.shape) :]) for name, piece in contents.pieces.items()],
            type,
            num_layers=space.num_layers,
            many_groups=many_groups,
            k_types=needs_llama_cpp(type),
        )
        for divisor in DIVISORS
    ]
    types = [tuple(GGML_QUANT_SIZES[plan.type] for plan in plans) for plans in zip(*by_divisor, strict=True)]
    return Counter((*axes, each) for axes, each in zip(labels, types, strict=True))


def _labels(piece: Piece, space: Space) -> tuple[Labels, Labels]:
    """Returns the labels of a piece's rows and columns."""
    parts, *columns = space.axes[piece.param]
    start, held = 0, []
    for label in parts:
        if piece.start <= start < piece.start + piece.shape[0]:
            held.append(label)
        start += space.lengths[label](space.shape)
    return (tuple(held), columns[0]) if columns else ((), tuple(held))
