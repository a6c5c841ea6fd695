"""Writes SmolLM2-135M's architecture at four shapes, with random weights: what docs/edge.md gives sizes and speeds of.

    python benchmarks/edge.py TOKENIZER OUT      # a tokenizer.json of at most 49152 tokens, a folder to write

Then, for each shape and type: `efficientllm export OUT/odd --to gguf --type q4_0 --out OUT/odd-q4_0.gguf`, and
`OMP_NUM_THREADS=1 efficientllm bench OUT/*-q4_0.gguf`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

SHAPES = {  # hidden size, FFN, heads, KV heads
    "source": (576, 1536, 9, 3),
    "256": (512, 1280, 6, 2),
    "32": (480, 1376, 6, 2),
    "odd": (490, 1346, 6, 2),
}


def main(tokenizer_file: str, out: str) -> None:
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_file=tokenizer_file, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    for name, (hidden, ffn, heads, kv_heads) in SHAPES.items():
        config = MistralConfig(
            vocab_size=49152,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=30,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=64,
            max_position_embeddings=8192,
            sliding_window=None,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(Path(out) / name)
        tokenizer.save_pretrained(Path(out) / name)
        print(name, f"{sum(param.numel() for param in model.parameters()):,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
