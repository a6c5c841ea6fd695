"""The same under the Hugging Face Trainer: give it the optimizer that the Pruner was built with.

python examples/hf_trainer.py OUT
"""

import sys
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from efficientllm import Pruner
from efficientllm.demo.docstrings import documents
from efficientllm.pruning import LinearPace

STEPS, PRUNE_STEPS, ROWS, SEQ_LEN = 40, 20, 8, 128

source = str(files("efficientllm.demo") / "model")
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

stream: list[int] = []
for document in documents():
    stream += tokenizer(document)["input_ids"]
    if len(stream) > STEPS * ROWS * SEQ_LEN:
        break
rows = torch.tensor(stream[: STEPS * ROWS * SEQ_LEN]).view(-1, SEQ_LEN)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
pruner = Pruner(model, optimizer, target_params=450_000, pace=LinearPace(PRUNE_STEPS, warmup_steps=2))

trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=sys.argv[1], max_steps=STEPS, per_device_train_batch_size=ROWS, logging_steps=10, report_to="none"
    ),
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    optimizers=(optimizer, None),
)
trainer.train()
trainer.save_model()
tokenizer.save_pretrained(sys.argv[1])
print(f"{pruner.num_params:,} parameters in {sys.argv[1]}")
