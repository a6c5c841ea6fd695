"""The loop: continued pretraining of a model that a Pruner makes smaller."""

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import get_wsd_schedule

from efficientllm.errors import TrainingError
from efficientllm.pruning import Pruner
from efficientllm.space import Limits
from efficientllm.training.checkpoint import Checkpoint
from efficientllm.training.config import RunConfig
from efficientllm.training.device import autocast_for
from efficientllm.training.engine import Engine
from efficientllm.training.recipe import FINAL_LR, Recipe
from efficientllm.training.watching import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BETAS, EPS = (0.9, 0.95), 1e-8
CLIP = 1.0
MOST_SKIPPED = 5  # steps in a row without a finite loss


class Trainer:
    """A model, its optimizer and Pruner, and how far they have come.

    Attributes:
        step: steps done, those skipped for a loss that is not finite included.
        skipped: how many were.
        feed: this rank's part of the batches, token ids (rows, seq_len), set by the caller to begin at `step`.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        config: RunConfig,
        recipe: Recipe,
        limits: Limits,
        engine: Engine,
        on_landing: Callable[[int], None],
    ) -> None:
        self.config, self.recipe, self.engine = config, recipe, engine
        model.train()
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model = engine.wrap(owned_(model))
        self.optimizer = make_optimizer(model, recipe, fused=engine.device.type == "cuda")
        self._lr_factor = get_wsd_schedule(
            self.optimizer,
            num_warmup_steps=recipe.warmup_steps,
            num_decay_steps=recipe.decay_steps,
            num_training_steps=recipe.total_steps,
            min_lr_ratio=FINAL_LR,
            decay_type="linear",
        ).lr_lambdas[0]
        assert config.target_params is not None
        self.pruner = Pruner(
            model,
            self.optimizer,
            config.target_params,
            pace=recipe.pace,
            saliency=config.saliency,  # type: ignore[arg-type]
            score=config.score,  # type: ignore[arg-type]
            score_ema=config.score_ema,
            compensate=config.compensate,
            limits=limits,
            save_at=config.save_at,
            on_landing=on_landing,
            compaction_tile=engine.compaction_tile,
            layout=engine,
        )
        self.watch = Watch(limits, self.pruner.source_params - config.target_params)
        self.autocast = autocast_for(engine.device)
        self.feed: Iterator[NDArray[Any]] = iter(())
        self.step = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._removed_last = False

    @property
    def model(self) -> Any:
        """The model; under FSDP another one after every compaction."""
        return self.pruner.model

    @property
    def tokens(self) -> int:
        return self.step * self.config.batch_tokens

    @property
    def done(self) -> bool:
        """Whether the run is over: all tokens seen, and the target reached."""
        return self.step >= self.recipe.total_steps and self.pruner.done

    def train_step(self) -> dict[str, Any]:
        """Does one optimizer step, with the removals that are due, and returns its row of metrics.

        Raises:
            TrainingError: after five steps in a row without a finite loss.
        """
        started = time.perf_counter()
        step, phase = self.step + 1, self.phase
        lr = self.recipe.lr * self._lr_factor(min(step, self.recipe.total_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, fishers = self._backward(step)
        gradients = [param.grad for param in self.model.parameters() if param.grad is not None]
        norm = self.engine.whole(get_total_norm(gradients))
        grad_norm = float(norm)
        before = len(self.pruner.removals)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            self.pruner.fishers = fishers
            self.pruner.score()  # before clipping: the Fisher form is not indifferent to it
            clip_grads_with_norm_(self.model.parameters(), CLIP, norm)
            self.optimizer.step()
            self._skipped_in_a_row = 0
        else:
            self.pruner.step += 1  # the pace goes on
            self.skipped += 1
            self._skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.step = step
        removals = self.pruner.removals[before:]
        warnings = self.watch.look(loss, grad_norm, self._removed_last) if finite else []
        warnings += self.watch.look_at(removals, self.pruner.shape)
        self._removed_last = bool(removals)
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"the loss or its gradient was not finite in {MOST_SKIPPED} steps in a row (up to step {step})"
            )
        row = {
            **self.row(phase),
            "loss": loss if math.isfinite(loss) else None,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens_per_second": round(self.config.batch_tokens / (time.perf_counter() - started), 1),
        }
        return {**row, "warnings": warnings} if warnings else row

    @property
    def phase(self) -> str:
        return "train" if self.pruner.done else "prune"

    def row(self, phase: str) -> dict[str, Any]:
        """Returns where the run stands, as a row of metrics without the figures of a step."""
        shape = self.pruner.shape
        return {
            "step": self.step,
            "tokens": self.tokens,
            "phase": phase,
            "loss": None,
            "lr": None,
            "grad_norm": None,
            "skipped": self.skipped,
            "params": self.pruner.num_params,
            "hidden_size": shape["hidden"],
            "intermediate_size": shape["ffn"],
            "num_attention_heads": shape["kv"] * shape["query"],
            "num_key_value_heads": shape["kv"],
            "tokens_per_second": None,
        }

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns all that a resumed run needs beside weights and optimizer: JSON values, and tensors."""
        pruner = self.pruner.state_dict()
        extra = {f"average.{kind}": scores for kind, scores in pruner.pop("average").items()}
        extra["random.cpu"] = torch.get_rng_state()
        if self.engine.device.type == "cuda":
            extra["random.cuda"] = torch.cuda.get_rng_state(self.engine.device)
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "removed_last": self._removed_last,
            "threads": torch.get_num_threads(),
            "pruner": pruner,
            "watch": self.watch.state_dict(),
        }
        return state, extra

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint whose model this Trainer was built with."""
        state, extra = checkpoint.state, checkpoint.extra()
        self.engine.scatter_moments_(checkpoint.moments(), self.optimizer, self.model)
        average = {
            name.removeprefix("average."): tensor.to(self.engine.device)
            for name, tensor in extra.items()
            if name.startswith("average.")
        }
        self.pruner.load_state_dict({**state["pruner"], "average": average})
        self.watch.load_state_dict(state["watch"])
        self.step, self.skipped = state["step"], state["skipped"]
        self._skipped_in_a_row, self._removed_last = state["skipped_in_a_row"], state["removed_last"]
        torch.set_num_threads(state["threads"])  # another number of threads adds up in another order
        torch.set_rng_state(extra["random.cpu"])
        if "random.cuda" in extra and self.engine.device.type == "cuda":
            torch.cuda.set_rng_state(extra["random.cuda"], self.engine.device)

    def _backward(self, step: int) -> tuple[float, dict[str, Tensor] | None]:
        """Returns the loss of a batch, its gradient accumulated in the model, and the Fisher form's F if it is due."""
        engine = self.engine
        batch = torch.from_numpy(next(self.feed)).to(engine.device)
        # a run may go on with another number of ranks, whose rows the micro-batch size must divide too
        micro_batches = torch.split(batch, math.gcd(self.config.micro_batch_size or len(batch), len(batch)))
        scored = self.config.saliency == "fisher" and (self.pruner.is_due(step) or self.config.score_ema > 0)
        fisher = Fisher(self.model, len(micro_batches)) if scored and not self.pruner.done else None
        total = torch.zeros((), device=engine.device)
        for number, rows in enumerate(micro_batches, start=1):
            whole = number == len(micro_batches) or fisher is not None  # a square needs the gradient of all ranks
            with engine.accumulate(self.model, last=whole):
                with self.autocast():
                    loss = engine.forward(self.model)(input_ids=rows, labels=rows, use_cache=False).loss
                (loss / len(micro_batches)).backward()
            total += loss.detach()
            if fisher:
                fisher.add()
        return float(engine.mean(total)) / len(micro_batches), fisher.finish() if fisher else None


class Fisher:
    """The diagonal Fisher: the mean of squared micro-batch gradients (method.md section 3).

    At steps with a removal due it holds two more copies of the weights: the squares, and the gradient so far.
    """

    def __init__(self, model: nn.Module, num_micro_batches: int) -> None:
        self.model, self.count = model, num_micro_batches
        self.squares: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self) -> None:
        """Takes the gradient of one micro-batch, of the loss over their number, out of the model."""
        for name, param in self.model.named_parameters():
            if param.grad is None:
                continue
            gradient, param.grad = param.grad, None
            square = (gradient * self.count).square_() / self.count
            self.squares[name] = self.squares[name].add_(square) if name in self.squares else square
            self.sums[name] = self.sums[name].add_(gradient) if name in self.sums else gradient

    def finish(self) -> dict[str, Tensor]:
        """Puts the whole gradient back into the model and returns F by parameter name."""
        for name, param in self.model.named_parameters():
            param.grad = self.sums.get(name)
        return self.squares


def make_optimizer(model: nn.Module, recipe: Recipe, fused: bool) -> torch.optim.AdamW:
    """Returns AdamW with weight decay on matrices alone."""
    params = list(model.parameters())
    groups = [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, eps=EPS, fused=fused or None)


def owned_(model: "PreTrainedModel") -> "PreTrainedModel":
    """Moves weights out of the mapped file that they were read from: its alignment would change how sums round."""
    with torch.no_grad():
        for param in model.parameters():
            param.data = param.data.clone()
    return model
