"""Under which of llama.cpp's architectures a model fits, and its hyper-parameters as GGUF metadata.

llama.cpp builds a fixed graph per architecture and fails, or is silently wrong, where a model differs from it. What
each graph takes was read from llama.cpp's src/models/*.cpp (October 2026) and is proven by loading (docs/edge.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from efficientllm.errors import UnsupportedModelError

Value = str | bool | int | float | list[bool] | list[int] | list[float] | list[str]
QKV_BIASES = frozenset({"q_proj", "k_proj", "v_proj"})
ALL_BIASES = QKV_BIASES | {"o_proj", "gate_proj", "up_proj", "down_proj"}
# llama.cpp takes these depths for the 27B models, whose attention is scaled by hidden_size / heads.
DEPTH_OF_27B = {"gemma2": 46, "gemma3": 62}
NO_CAP = 1e6  # llama.cpp caps Gemma 2's logits in any case; so high, the cap changes nothing in float32


@dataclass(frozen=True)
class Architecture:
    """What one of llama.cpp's graphs takes.

    Attributes:
        permuted: rotary pairs are neighbours, so query and key rows are stored in another order than transformers'.
        square: heads × head_dim must be the hidden size.
        widened: where it is not, the model is written wider than it is, by zeros (`widening`).
        biases: projections that may have one.
        scalings: kinds of rotary scaling it computes, beside "default".
        partial: only a part of each head may be rotated.
        windows: sliding windows are computed; elsewhere the context is cut to the window, where both are the same.
        per_layer: layers may differ in width; the metadata holds the widths as lists.
    """

    permuted: bool = False
    square: bool = False
    widened: bool = False
    biases: frozenset[str] = frozenset()
    scalings: tuple[str, ...] = ("linear", "yarn")
    partial: bool = False
    windows: bool = False
    per_layer: bool = False
    activation: str = "silu"
    refused: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)  # by reason


def _has_nope(config: Any) -> bool:
    return not all(getattr(config, "no_rope_layers", None) or [1])


def _has_other_nope(config: Any) -> bool:
    return any(bool(rope) != ((layer + 1) % 4 != 0) for layer, rope in enumerate(config.no_rope_layers))


def _is_untied(config: Any) -> bool:
    return not config.tie_word_embeddings


def _is_bidirectional(config: Any) -> bool:
    return bool(config.use_bidirectional_attention)


ANY_ROPE = ("linear", "yarn", "llama3", "longrope")
UNTIED = {"an untied output head": _is_untied}
BIDIRECTIONAL = {"bidirectional attention": _is_bidirectional}
ARCHITECTURES = {
    "llama": Architecture(
        permuted=True,
        biases=ALL_BIASES,
        scalings=ANY_ROPE,
        refused={"layers without rotary positions": _has_nope},
    ),
    "deci": Architecture(
        permuted=True,
        biases=ALL_BIASES,
        scalings=ANY_ROPE,
        per_layer=True,
        refused={"layers without rotary positions": _has_nope},
    ),
    "granite": Architecture(permuted=True, biases=ALL_BIASES, scalings=ANY_ROPE),
    "smollm3": Architecture(
        permuted=True, biases=QKV_BIASES, refused={"no_rope_layers other than every fourth": _has_other_nope}
    ),
    "qwen2": Architecture(square=True, biases=QKV_BIASES),
    "qwen3": Architecture(biases=QKV_BIASES),
    "phi3": Architecture(square=True, partial=True, scalings=("linear", "yarn", "longrope")),
    "olmo2": Architecture(square=True, widened=True, biases=QKV_BIASES),
    "gemma": Architecture(
        biases=QKV_BIASES, scalings=("linear",), activation="gelu_pytorch_tanh", refused=UNTIED | BIDIRECTIONAL
    ),
    "gemma2": Architecture(
        biases=QKV_BIASES,
        scalings=("linear",),
        windows=True,
        activation="gelu_pytorch_tanh",
        refused=UNTIED | BIDIRECTIONAL,
    ),
    "gemma3": Architecture(
        biases=QKV_BIASES, scalings=("linear",), windows=True, activation="gelu_pytorch_tanh", refused=BIDIRECTIONAL
    ),
}
# By model_type, best first: llama.cpp's llama graph is the most general one and computes the same function.
CANDIDATES = {
    "llama": ("llama",),
    "mistral": ("llama",),
    "qwen2": ("qwen2", "llama"),
    "qwen3": ("qwen3",),
    "smollm3": ("smollm3", "llama"),
    "granite": ("granite",),
    "phi3": ("phi3", "llama"),
    "olmo2": ("olmo2",),
    "gemma": ("gemma",),
    "gemma2": ("gemma2",),
    "gemma3_text": ("gemma3",),
}
# Where layers have widths of their own: the one graph that takes lists of them is Llama's function, nothing more.
PER_LAYER = ("llama", "mistral", "qwen2", "smollm3", "phi3")
QK_NORM, GEMMA = "no query and key norms", "neither Gemma's norms nor its GELU"
LACKING = {
    "qwen3": QK_NORM,
    "olmo2": QK_NORM,
    "gemma3_text": f"{QK_NORM}, {GEMMA}",
    "gemma2": GEMMA,
    "gemma": GEMMA,
    "granite": "none of Granite's multipliers",
}


def find_architecture(config: Any, biases: set[str], per_layer: bool = False) -> str:
    """Returns the name of the llama.cpp architecture that computes exactly what the model does.

    Args:
        biases: the model's projections that have a bias, such as "q_proj".
        per_layer: whether layers shall be able to have widths of their own, even if they have not yet.

    Raises:
        UnsupportedModelError: none does; names the reasons.
    """
    names = CANDIDATES.get(config.model_type)
    if names is None:
        raise UnsupportedModelError(
            f"GGUF: model_type '{config.model_type}' is not one of {', '.join(CANDIDATES)}; convert it with "
            "llama.cpp's own tools"
        )
    if per_layer or config.is_heterogeneous:
        if config.model_type not in PER_LAYER:
            raise UnsupportedModelError(
                "GGUF: deci, llama.cpp's only architecture for layers that differ in width, has "
                f"{LACKING[config.model_type]}, so it cannot hold a {config.model_type} model; prune it with --layout "
                "uniform"
            )
        if any(getattr(layer, "skip", None) or not layer.intermediate_size for layer in _layers(config)):
            raise UnsupportedModelError("GGUF: a layer lacks its attention or feed-forward part; deci needs both")
        names = ("deci",)
    reasons = {name: _refusal(ARCHITECTURES[name], config, biases) for name in names}
    for name, reason in reasons.items():
        if reason is None:
            return name
    found = "; ".join(f"{name} does not support {reason}" for name, reason in reasons.items())
    raise UnsupportedModelError(f"GGUF: no llama.cpp architecture fits this {config.model_type} model: {found}")


def _refusal(architecture: Architecture, config: Any, biases: set[str]) -> str | None:
    """Returns what a graph lacks for a model, None if it has all."""
    if architecture.square and not architecture.widened:
        heads, size, hidden = config.num_attention_heads, head_dim(config), config.hidden_size
        if heads * size != hidden:
            return f"{heads} heads × {size} = {heads * size} with hidden_size {hidden}"
    if extra := sorted(biases - architecture.biases):
        return f"a bias in {extra[0]}"
    kind = rope_parameters(config).get("rope_type", "default")
    if kind != "default" and kind not in architecture.scalings:
        return f"rope_type '{kind}'"
    if rope_parameters(config).get("partial_rotary_factor", 1.0) != 1.0 and not architecture.partial:
        return "a partial rotary factor"
    if kind == "yarn" and rope_parameters(config).get("truncate") is False:
        return "yarn without truncation"
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation not in (architecture.activation, "swish" if architecture.activation == "silu" else ""):
        return f"the activation '{activation}'"
    return next((reason for reason, is_so in architecture.refused.items() if is_so(config)), None)


def _layers(config: Any) -> list[Any]:
    """Returns each layer's config, with what it skips."""
    return [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_parameters(config: Any) -> dict[str, Any]:
    """Returns the rotary parameters of the full-attention layers."""
    found = config.rope_parameters or {}
    return dict(found.get("full_attention", found))


def query_scale(config: Any, name: str) -> float:
    """Returns the factor that queries must carry, since Gemma 2's and 3's graphs scale attention by their own rule."""
    if name not in DEPTH_OF_27B:
        return 1.0
    is_27b = config.num_hidden_layers == DEPTH_OF_27B[name]
    theirs = config.hidden_size // config.num_attention_heads if is_27b else head_dim(config)
    return float((theirs / config.query_pre_attn_scalar) ** 0.5)


def context_length(config: Any, name: str) -> int:
    """Returns the longest context that llama.cpp computes exactly: up to the sliding window where it has none."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = window and (kinds is None or "sliding_attention" in kinds)
    return min(longest, int(window or longest)) if slides and not ARCHITECTURES[name].windows else longest


def _width(config: Any, name: str, word: str) -> int | list[int]:
    """Returns a width, or where the architecture takes them layer by layer, all layers'."""
    sizes = [getattr(layer, word) or layer.num_attention_heads for layer in _layers(config)]
    return sizes if ARCHITECTURES[name].per_layer else sizes[0]


def hyper_parameters(config: Any, name: str) -> dict[str, Value]:
    """Returns the metadata of a model under an architecture, without tokenizer and rotary scaling."""
    head = head_dim(config)
    partial = rope_parameters(config).get("partial_rotary_factor", 1.0)
    values: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": context_length(config, name),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": _width(config, name, "intermediate_size"),
        "attention.head_count": _width(config, name, "num_attention_heads"),
        "attention.head_count_kv": _width(config, name, "num_key_value_heads"),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(head * partial),
        "rope.freq_base": float(rope_parameters(config)["rope_theta"]),
    }
    if name == "granite":
        values |= {
            "attention.scale": float(config.attention_multiplier),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
    if name == "phi3":
        values["attention.sliding_window"] = 0  # tells Phi-4 from a Phi-3 of an older converter
    if ARCHITECTURES[name].windows and config.sliding_window:
        values["attention.sliding_window"] = config.sliding_window
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    if name == "gemma2":
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping or NO_CAP)
        values["final_logit_softcapping"] = float(config.final_logit_softcapping or NO_CAP)
    if name == "gemma3":
        values["final_logit_softcapping"] = float(config.final_logit_softcapping or 0)
        values["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    return {f"{name}.{key}": value for key, value in values.items()}
