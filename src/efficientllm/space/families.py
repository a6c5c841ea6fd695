"""Axis labels of every supported family: parameter-name suffix to one label per axis.

Labels: `vocab` and `head_dim` never shrink; `hidden`, `ffn`, `kv` (key and value rows, one block a KV head) and `query`
(query rows, one block a query head) do. A fused axis is a tuple of labels in storage order. A parameter that no row
names is an error, never a guess; to add a family, add its rows (docs/families.md).
"""

from efficientllm.errors import UnsupportedModelError

Label = str | tuple[str, ...]
Table = dict[str, tuple[Label, ...]]

LLAMA: Table = {
    "embed_tokens.weight": ("vocab", "hidden"),
    "lm_head.weight": ("vocab", "hidden"),
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.weight": ("kv", "hidden"),
    "self_attn.k_proj.bias": ("kv",),
    "self_attn.v_proj.weight": ("kv", "hidden"),
    "self_attn.v_proj.bias": ("kv",),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "self_attn.o_proj.bias": ("hidden",),
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.gate_proj.bias": ("ffn",),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.bias": ("ffn",),
    "mlp.down_proj.weight": ("hidden", "ffn"),
    "mlp.down_proj.bias": ("hidden",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "model.norm.weight": ("hidden",),
}
POST_NORMS: Table = {
    "pre_feedforward_layernorm.weight": ("hidden",),
    "post_feedforward_layernorm.weight": ("hidden",),
}
HEAD_NORMS: Table = {
    "self_attn.q_norm.weight": ("head_dim",),
    "self_attn.k_norm.weight": ("head_dim",),
}

FAMILIES: dict[str, Table] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | HEAD_NORMS,
    "smollm3": LLAMA,
    "granite": LLAMA,
    "phi3": LLAMA
    | {
        "self_attn.qkv_proj.weight": (("query", "kv", "kv"), "hidden"),
        "mlp.gate_up_proj.weight": (("ffn", "ffn"), "hidden"),
    },
    "olmo2": LLAMA | POST_NORMS | {"self_attn.q_norm.weight": ("query",), "self_attn.k_norm.weight": ("kv",)},
    "gemma": LLAMA,
    "gemma2": LLAMA | POST_NORMS,
    "gemma3_text": LLAMA | POST_NORMS | HEAD_NORMS,
}

REFUSED = {
    "gpt2": "LayerNorm over the residual stream revives zeroed entries, and its head size is hidden/heads",
    "gpt_neox": "LayerNorm over the residual stream revives zeroed entries, and its head size is hidden/heads",
    "gptj": "LayerNorm over the residual stream revives zeroed entries, and its head size is hidden/heads",
    "opt": "LayerNorm over the residual stream revives zeroed entries, and its head size is hidden/heads",
    "falcon": "LayerNorm over the residual stream revives zeroed entries, and its head size is hidden/heads",
    "stablelm": "LayerNorm over the residual stream revives zeroed entries, and its head size is hidden/heads",
    "starcoder2": "LayerNorm over the residual stream revives zeroed entries",
    "olmo": "LayerNorm over the residual stream revives zeroed entries",
    "cohere": "LayerNorm over the residual stream revives zeroed entries",
    "mixtral": "experts are not in the pruning space",
    "gemma3": "the vision encoder is not in the pruning space; save its text model (gemma3_text) by itself",
}

# `hidden_size % num_attention_heads == 0` is demanded by these families' configs even when head_dim is set
# (transformers 5.23, validate_architecture); a bias-free Llama escapes by being saved as Mistral.
HEADS_DIVIDE_HIDDEN = ("llama", "gemma2", "gemma3_text")


def check_family(family: str) -> None:
    """Raises UnsupportedModelError if models of this `model_type` cannot be pruned, with the reason."""
    if family not in FAMILIES:
        reason = REFUSED.get(family, "no table of axis labels")
        raise UnsupportedModelError(
            f"{family}: cannot be pruned ({reason}). Supported: {', '.join(FAMILIES)}. "
            "To add a family, see docs/families.md."
        )
