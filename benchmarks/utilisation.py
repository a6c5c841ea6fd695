"""How much of a GPU's matrix rate training reaches, in bf16 and compiled; and what a removal costs a step there.

    python benchmarks/utilisation.py            # some 4 minutes on a GPU; without one it says so
    python benchmarks/utilisation.py --smoke    # the same code at a tiny shape on whatever is there; nothing to quote

Utilisation is FLOPs of the model (6 a matrix weight and token, and attention) per second, over those of an 8192³ bf16
product on the same card. Rows of 2,048 tokens, as many a pass as fit.
"""

import sys
from statistics import median

import steps
import torch
from shapes import find_device, make_model, make_trainer, now, one_process, quiet, show, timed, train_step

from efficientllm.distributed.device import memory_bytes
from efficientllm.space import find_space
from efficientllm.training.memory_estimate import PassSetup, fitting_micro_batch

ASKED = {"SmolLM-135M": 0.40, "SmolLM-360M": 0.50, "SmolLM-1.7B": 0.55}
ROWS, SEQ_LEN = 32, 2048
STEPS, WARMUP = 10, 3


def matrix_rate(device: torch.device, size: int) -> float:
    """Returns the FLOP/s of a square bf16 product, the best of 5 runs of 10."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    seconds = min(timed(lambda: [a @ b for _ in range(10)]) for _ in range(5))
    return 10 * 2 * size**3 / seconds


def model_rate(name: str, precision: str, rows: int, seq_len: int) -> tuple[float, str]:
    """Returns the model's FLOP/s in training, compiled, and its tokens/s in words."""
    engine = one_process(precision, compiles=True)
    model = make_model(name)
    space = find_space(model)
    micro = fitting_micro_batch(
        space,
        space.shape,
        PassSetup(seq_len=seq_len, device="cuda", activation_bytes=2 if precision == "bf16" else 4),
        rows=rows,
        memory_bytes=memory_bytes(engine.device),
    )
    trainer = make_trainer(model, engine, rows=rows, seq_len=seq_len, micro_batch_size=micro)
    for _ in range(WARMUP):
        train_step(trainer)
    seconds = median(train_step(trainer) for _ in range(STEPS))
    tokens = rows * seq_len / seconds
    return tokens * space.flops_per_token(space.shape, seq_len), f"{tokens:,.0f} tokens/s, {micro} rows a pass"


def main(smoke: bool) -> None:
    device = find_device()
    if device.type != "cuda" and not smoke:
        print("no GPU here: utilisation is measured on one alone (--smoke runs the code at a tiny shape)")
        return
    rows, size = [], 256 if smoke else 8192
    rate = matrix_rate(device, size)
    rows.append((f"{size}³ bf16 product", f"{rate / 1e12:.3f} TFLOP/s", ""))
    for name in ("tiny",) if smoke else ASKED:
        model, text = model_rate(name, "float32" if smoke else "bf16", *((4, 64) if smoke else (ROWS, SEQ_LEN)))
        rows.append((f"utilisation, {name}", f"{model / rate:.3f} ({text})", "" if smoke else f"{ASKED[name]:.2f}"))
        print(*rows[-1], file=sys.stderr)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show(rows)
    if smoke:
        steps.SHAPE, steps.SEQ_LEN, steps.ROUNDS = "tiny", 64, 2
    steps.main(["steps"])


if __name__ == "__main__":
    quiet()
    start = now()
    main("--smoke" in sys.argv)
