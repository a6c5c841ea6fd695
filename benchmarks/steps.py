"""What pruning costs a training step, the pruning phase and the peak memory, at SmolLM-135M's shape.

    python benchmarks/steps.py [steps] [phase] [memory]      # by default all three, some 20 minutes

Random weights, a row of 512 tokens a step, two threads, float32, AdamW. Plain and pruned steps alternate in one
process, so that what else runs on the machine slows both; every ratio is a median over pairs.
"""

import resource
import subprocess
import sys
import time
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from efficientllm.pruning import LinearPace, Pruner, SlotPace
from efficientllm.pruning.relabel import mistral_config
from efficientllm.space.dims import Shape

SEQ_LEN, ROWS = 512, 1
PAIRS, WARMUP = 8, 1
TARGET, PHASE_STEPS, PHASE_WARMUP, PHASES = 70_000_000, 21, 1, 1
TARGETS = {"step, A": 1.05, "step, B": 1.30, "phase, A": 1.10, "memory, A": 1.10}


def smollm_135m() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


class Training:
    """A model with random weights, its optimizer, and maybe a Pruner."""

    def __init__(self, shape: Shape | None = None) -> None:
        torch.manual_seed(0)
        self.model: PreTrainedModel
        if shape is None:
            self.model = LlamaForCausalLM(smollm_135m())
        else:  # Llama's config refuses most shapes on the way
            config = mistral_config(smollm_135m())
            config.hidden_size, config.intermediate_size = shape["hidden"], shape["ffn"]
            config.num_key_value_heads, config.num_attention_heads = shape["kv"], shape["kv"] * shape["query"]
            self.model = MistralForCausalLM(config)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step(self) -> float:
        """Trains one step on random tokens and returns its seconds."""
        tokens = torch.randint(0, self.model.config.vocab_size, (ROWS, SEQ_LEN))
        start = time.perf_counter()
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def removal_step(compensate: bool) -> list[float]:
    """Returns ratios of a step with a removal to the plain step beside it."""
    plain, pruned = Training(), Training()
    for _ in range(WARMUP):
        plain.step(), pruned.step()
    Pruner(pruned.model, pruned.optimizer, TARGET, pace=SlotPace(1, equal=True), compensate=compensate)
    ratios = []
    for pair in track(range(PAIRS), f"steps, {'B' if compensate else 'A'}"):
        first, second = (plain, pruned) if pair % 2 else (pruned, plain)
        seconds = {first: first.step()}
        seconds[second] = second.step()
        ratios.append(seconds[pruned] / seconds[plain])
    return ratios


def phase(compensate: bool) -> tuple[float, float]:
    """Returns the seconds of a pruning phase, and those of plain steps at the live shapes it passes."""
    pruned = Training()
    pruner = Pruner(
        pruned.model,
        pruned.optimizer,
        TARGET,
        pace=LinearPace(PHASE_STEPS, PHASE_WARMUP),
        compensate=compensate,
    )
    for _ in range(PHASE_WARMUP):
        pruned.step()
    pruning = passed = 0.0
    for _ in track(range(PHASE_STEPS - PHASE_WARMUP), f"phase, {'B' if compensate else 'A'}"):
        plain = Training(pruner.shape)
        plain.step(), plain.step()  # the first makes the moments
        before = plain.step()
        pruning += pruned.step()
        passed += (before + plain.step()) / 2
    return pruning, passed


def peak_memory(kind: str) -> int:
    """Returns the peak resident bytes of a child process that trains for as many steps as a pruning phase takes."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind], check=True, capture_output=True, text=True, timeout=3600
    )
    return int(done.stdout.split()[-1])


def child(kind: str) -> None:
    training = Training()
    if kind != "plain":
        pace = LinearPace(PHASE_STEPS, PHASE_WARMUP)
        Pruner(training.model, training.optimizer, TARGET, pace=pace, compensate=kind == "B")
    for _ in range(PHASE_STEPS if kind != "plain" else 4):
        training.step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main(parts: list[str]) -> None:
    console = Console()
    table = Table("ratio", "measured", "target", "of")
    results: list[tuple[str, float, str]] = []
    if not parts or "steps" in parts:
        for name, compensate in (("A", False), ("B", True)):
            ratios = sorted(removal_step(compensate))
            spread = f"median of {len(ratios)} pairs, half of them {ratios[len(ratios) // 4]:.3f} to "
            results.append((f"step, {name}", median(ratios), spread + f"{ratios[-1 - len(ratios) // 4]:.3f}"))
    if not parts or "phase" in parts:
        for name, compensate in (("A", False), ("B", True)):
            runs = [phase(compensate) for _ in range(PHASES if not compensate else 1)]
            ratios = [pruning / passed for pruning, passed in runs]
            seconds = ", ".join(f"{pruning:.0f} s to {passed:.0f} s" for pruning, passed in runs)
            results.append((f"phase, {name}", median(ratios), seconds))
    if not parts or "memory" in parts:
        plain = peak_memory("plain")
        for name in ("A", "B"):
            pruning = peak_memory(name)
            results.append((f"memory, {name}", pruning / plain, f"{pruning / 1e9:.2f} GB to {plain / 1e9:.2f} GB"))
    for name, ratio, of in results:
        target = TARGETS.get(name)
        table.add_row(name, f"{ratio:.3f}", f"{target:.2f}" if target else "", of)
    console.print(table)


if __name__ == "__main__":
    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(2)
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main(sys.argv[1:])
