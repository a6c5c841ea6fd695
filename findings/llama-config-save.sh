#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (2026-11-28).
#
# A Llama's config takes any hidden size by assignment, and a model built from it computes, in every forward pass. Only
# save_pretrained refuses it, because the heads do not divide the hidden size, although head_dim is given: after hours of
# training, and with an empty folder left behind.
#
# Expected: the assignment or the model's constructor refuses what cannot be saved, or the folder is not made.
# Seen:     the forward pass works, save_pretrained raises, and the folder is there without a config.json.
#
# Exits with 0 while that is so, with 1 once it has changed.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=16, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)
config.hidden_size = 30  # four heads do not divide it
model = LlamaForCausalLM(config)
loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
loss.backward()
print(f"forward and backward pass at hidden size 30: loss {loss.item():.3f}")
try:
    model.save_pretrained("saved")
    error = None
except Exception as refused:
    error = f"{type(refused).__name__}: {str(refused).splitlines()[-1].strip()}"
left = sorted(path.name for path in Path("saved").iterdir()) if Path("saved").exists() else None
print(f"save_pretrained: {error}; the folder holds {left}")
sys.exit(not (loss.isfinite() and error and left is not None and "config.json" not in left))
PY
