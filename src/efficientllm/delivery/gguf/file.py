"""A GGUF file, written a tensor at a time, and read back: every tensor and every value compared with the model."""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize
from torch import Tensor

from efficientllm.delivery.gguf.architecture import Value
from efficientllm.delivery.gguf.tensors import Array, Piece
from efficientllm.delivery.gguf.types import Plan
from efficientllm.errors import EfficientLLMError

# Largest root mean square error of a tensor that its type explains, relative to the tensor: about three times what
# normally distributed weights have; swapped rows give more than 1.
ERROR = {
    T.F32: 1e-6,
    T.F16: 1e-3,
    T.BF16: 5e-3,
    T.Q8_0: 0.02,
    T.Q6_K: 0.05,
    T.Q5_K: 0.1,
    T.Q5_1: 0.1,
    T.Q5_0: 0.12,
    T.Q4_K: 0.2,
    T.Q4_1: 0.2,
    T.Q4_0: 0.25,
}


@dataclass(frozen=True)
class Contents:
    """What a model's file holds, apart from the types of its tensors.

    Attributes:
        name: llama.cpp's architecture.
        values: metadata by key.
        pieces: by tensor name, which part of which parameter it is.
        extra: tensors that no parameter holds.
    """

    name: str
    values: Mapping[str, Value]
    pieces: Mapping[str, Piece]
    extra: Mapping[str, Array]

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors, rows first, in the file's order."""
        held = [(name, piece.shape) for name, piece in self.pieces.items()]
        return held + [(name, array.shape) for name, array in self.extra.items()]


def header_bytes(contents: Contents) -> int:
    """Returns the bytes before the first tensor, by writing them: the same at all shapes and types of the tensors."""
    plans = [Plan(name, shape, T.F32, T.F32) for name, shape in contents.shapes]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        _write_header(path, contents, plans).close()
        return padded(path.stat().st_size)


def padded(num_bytes: int) -> int:
    """Returns the bytes that a header or tensor takes in a file."""
    return int(gguf.GGUFWriter.ggml_pad(num_bytes, gguf.GGUF_DEFAULT_ALIGNMENT))


def write_gguf(path: Path, contents: Contents, plans: Sequence[Plan], weights: Mapping[str, Tensor]) -> None:
    """Writes metadata, and the model's weights as planned."""
    writer = _write_header(path, contents, plans)
    try:
        for plan in plans:
            piece = contents.pieces.get(plan.name)
            array = piece.stored(weights[piece.param]) if piece else contents.extra[plan.name]
            writer.write_tensor_data(np.ascontiguousarray(quantize(array, plan.type)))
    except OSError as error:
        raise error if error.errno else OSError(errno.ENOSPC, str(error)) from None  # numpy's own has no number
    finally:
        writer.close()


def _write_header(path: Path, contents: Contents, plans: Sequence[Plan]) -> gguf.GGUFWriter:
    """Writes metadata and the tensors' infos, and returns the writer, open."""
    writer = gguf.GGUFWriter(path, contents.name)
    try:
        for key, value in contents.values.items():
            _add(writer, key, value)
        for plan in plans:
            writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), plan.num_bytes, plan.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except BaseException:
        writer.close()
        raise
    return writer


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def check_file(path: Path, contents: Contents, plans: Sequence[Plan], weights: Mapping[str, Tensor]) -> float:
    """Reads a file back and compares everything in it with the model; returns the largest relative error of a tensor.

    Raises:
        EfficientLLMError: a value or tensor is missing, unexpected, or not the model's.
    """
    reader = gguf.GGUFReader(path)
    for key, value in {"general.architecture": contents.name, **contents.values}.items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        if not _same(found, value):
            raise EfficientLLMError(
                f"{path}: '{key}' reads back as {_short(found)}, not {_short(value)}; report this as a bug"
            )
    planned = {plan.name: plan for plan in plans}
    if extras := {tensor.name for tensor in reader.tensors} ^ set(planned):
        raise EfficientLLMError(f"{path}: tensor '{min(extras)}' is missing or unexpected; report this as a bug")
    worst = 0.0
    for tensor in reader.tensors:
        plan, piece = planned[tensor.name], contents.pieces.get(tensor.name)
        array = dequantize(np.asarray(tensor.data), tensor.tensor_type)
        if tensor.tensor_type != plan.type or array.shape != plan.shape:
            raise EfficientLLMError(
                f"{path}: '{tensor.name}' is {tensor.tensor_type.name} {array.shape}, not the planned {plan.type.name} "
                f"{plan.shape}; report this as a bug"
            )
        found, expected = (
            (piece.restored(array).numpy(), piece.original(weights[piece.param]).numpy())
            if piece
            else (array, contents.extra[tensor.name])
        )
        error = relative_error(found, expected)
        if not error <= ERROR[plan.type]:
            raise EfficientLLMError(
                f"{path}: '{tensor.name}' ({plan.type.name}) differs from the model by {error:.2g} of its size, more "
                f"than the rounding of its type ({ERROR[plan.type]}); report this as a bug"
            )
        worst = max(worst, error)
    return worst


def relative_error(found: Array, expected: Array) -> float:
    """Returns the root mean square difference relative to the root mean square of what is expected."""
    size = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    difference = float(np.sqrt(np.mean(np.square(found.astype(np.float64) - expected))))
    return difference / max(size, 1e-12)


def _same(found: Any, value: Any) -> bool:
    if isinstance(value, list) and isinstance(found, list):
        return len(found) == len(value) and all(_same(each, other) for each, other in zip(found, value, strict=True))
    if isinstance(value, float) and isinstance(found, float):
        return bool(np.float32(found) == np.float32(value))
    return type(found) is type(value) and found == value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "…"
