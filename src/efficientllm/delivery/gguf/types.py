"""What each tensor of a GGUF file becomes: llama.cpp's own rules, and the bits per weight that follow.

Mirrors `llama_tensor_get_type_impl` and `tensor_type_fallback` of llama.cpp's src/llama-quant.cpp (October 2026) for
the types offered here; tests/delivery/gguf/test_llama_cpp.py compares with what llama.cpp's quantiser really writes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as T

TYPES: dict[str, tuple[T, LlamaFileType]] = {  # by --type: most tensors' type, and the file's
    "f32": (T.F32, LlamaFileType.ALL_F32),
    "f16": (T.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (T.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (T.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (T.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (T.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (T.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_k_m": (T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k_m": (T.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": (T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
}
PLAIN = (T.F32, T.F16, T.BF16)
K_TYPES = (T.Q4_K, T.Q5_K, T.Q6_K)  # blocks of 256 columns; `gguf` reads them, only llama.cpp writes them
FALLBACK = {T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}  # where columns are not a multiple of 256


@dataclass(frozen=True)
class Plan:
    """What one tensor becomes.

    Attributes:
        shape: as torch has it, rows first; the columns are what is divided into blocks.
        wanted: what it would be if its columns were a multiple of the block.
    """

    name: str
    shape: tuple[int, ...]
    type: T
    wanted: T

    @property
    def num_bytes(self) -> int:
        block: int
        size: int
        block, size = GGML_QUANT_SIZES[self.type]
        return self.num_weights // block * size

    @property
    def num_weights(self) -> int:
        weights = 1
        for size in self.shape:
            weights *= size
        return weights


def needs_llama_cpp(type: str) -> bool:
    return TYPES[type][0] in K_TYPES


def plan_types(
    tensors: Iterable[tuple[str, tuple[int, ...]]], type: str, *, num_layers: int, many_groups: bool, k_types: bool
) -> list[Plan]:
    """Returns what each (name, shape) becomes in a file of --type `type`.

    Args:
        num_layers, many_groups: of the model; 80 layers with several queries a key have their own rule.
        k_types: whether Q4_K, Q5_K, Q6_K can be written; without them their fallbacks are used.
    """
    tensors = list(tensors)
    is_tied = all(name != "output.weight" for name, _ in tensors)
    plans = []
    for name, shape in tensors:
        if len(shape) < 2 or name.endswith(("_norm.weight", ".bias")):
            plans.append(Plan(name, shape, T.F32, T.F32))
            continue
        wanted = _wanted(name, shape[-1], type, num_layers, many_groups, is_tied)
        plans.append(Plan(name, shape, _fitting(wanted, shape[-1], k_types), wanted))
    return plans


def _wanted(name: str, columns: int, type: str, num_layers: int, many_groups: bool, is_tied: bool) -> T:
    default = TYPES[type][0]
    if default in PLAIN:
        return default
    if name == "output.weight" or (is_tied and name == "token_embd.weight"):
        block = GGML_QUANT_SIZES[default][0]
        return T.Q8_0 if columns % block or default == T.Q8_0 else T.Q6_K
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    is_value = name.endswith(("attn_v.weight", "attn_qkv.weight"))
    mixed = type in ("q4_k_m", "q5_k_m")
    if mixed and (is_value or "ffn_down" in name) and _use_more_bits(layer, num_layers):
        return T.Q6_K
    if is_value and default == T.Q4_K and num_layers == 80 and many_groups:
        return T.Q5_K
    return default


def _use_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _fitting(wanted: T, columns: int, k_types: bool) -> T:
    if wanted in K_TYPES and (columns % 256 or not k_types):
        wanted = FALLBACK[wanted]
    return T.F16 if columns % GGML_QUANT_SIZES[wanted][0] else wanted


def bits_per_weight(plans: Sequence[Plan]) -> float:
    """Returns the bits per weight over all tensors, without the file's header."""
    return 8 * sum(plan.num_bytes for plan in plans) / sum(plan.num_weights for plan in plans)


def type_lines(plans: Sequence[Plan], type: str) -> list[str]:
    """Returns what is printed before the file is written: a line a type, and why some tensors are larger than asked."""
    weights = sum(plan.num_weights for plan in plans)
    lines = [f"{type}: {bits_per_weight(plans):.2f} bits per weight, {sum(plan.num_bytes for plan in plans):,} bytes"]
    for kind in sorted({plan.type for plan in plans}, key=lambda kind: -_bytes_of(plans, kind)):
        chosen = [plan for plan in plans if plan.type == kind]
        share = sum(plan.num_weights for plan in chosen) / weights
        lines.append(f"  {kind.name:5} {len(chosen):4} tensors, {share:6.1%} of the weights: {_kinds(chosen, plans)}")
    for kind in sorted({(plan.wanted, plan.type, plan.shape[-1]) for plan in plans if plan.type != plan.wanted}):
        wanted, got, columns = kind
        block = GGML_QUANT_SIZES[wanted][0]
        why = f"{columns} columns are not a multiple of {block}" if columns % block else "only llama.cpp can write it"
        lines.append(f"  {wanted.name} became {got.name}: {why}")
    return lines


def _bytes_of(plans: Sequence[Plan], kind: T) -> int:
    return sum(plan.num_bytes for plan in plans if plan.type == kind)


def _kinds(chosen: Sequence[Plan], plans: Sequence[Plan]) -> str:
    """Returns the chosen tensors' names without layers, with how many of all that are so named if they are not all."""
    counts, totals = (Counter(re.sub(r"^blk\.\d+\.", "", plan.name) for plan in each) for each in (chosen, plans))
    return ", ".join(
        kind.removesuffix(".weight") + (f" ({count} of {totals[kind]})" if count < totals[kind] else "")
        for kind, count in counts.items()
    )
