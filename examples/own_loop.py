"""A hand-written loop that shrinks its model: one line more than the loop without.

python examples/own_loop.py OUT
"""

import sys
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from efficientllm import Pruner
from efficientllm.demo.docstrings import documents
from efficientllm.pruning import LinearPace

STEPS, PRUNE_STEPS, ROWS, SEQ_LEN = 40, 20, 8, 128

source = str(files("efficientllm.demo") / "model")
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()

stream: list[int] = []
for document in documents():
    stream += tokenizer(document)["input_ids"]
    if len(stream) > STEPS * ROWS * SEQ_LEN:
        break
batches = torch.tensor(stream[: STEPS * ROWS * SEQ_LEN]).view(STEPS, ROWS, SEQ_LEN)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
pruner = Pruner(model, optimizer, target_params=450_000, pace=LinearPace(PRUNE_STEPS, warmup_steps=2))

for step, batch in enumerate(batches, start=1):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}, {pruner.num_params:,} parameters")

model.save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
