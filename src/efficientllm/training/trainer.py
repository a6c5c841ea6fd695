"""The loop: continued pretraining of a model that a Pruner makes smaller."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import get_wsd_schedule

from efficientllm.errors import TrainingError
from efficientllm.pruning import Pruner, Removal
from efficientllm.space import Limits
from efficientllm.space.dims import Shape
from efficientllm.training.checkpoint import Checkpoint
from efficientllm.training.config import RunConfig
from efficientllm.training.loss import chunked_loss_, loss_and_slopes_
from efficientllm.training.process import Engine
from efficientllm.training.recipe import FINAL_LR, Recipe
from efficientllm.training.watching import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BETAS, EPS = (0.9, 0.95), 1e-8
CLIP = 1.0
MOMENTS = ("exp_avg", "exp_avg_sq")
MOST_SKIPPED = 5  # steps in a row without a finite loss


class Trainer:
    """A model, its optimizer and Pruner, and how far they have come.

    A step's loss and gradient norm stay on the device until `settle` asks for them: steps in which nothing is removed
    never wait for it.

    Attributes:
        step: steps done, those skipped for a loss that is not finite included.
        skipped: how many were, up to the last `settle`.
        feed: this rank's part of the batches, token ids (rows, seq_len) on the device, set by the caller to begin at
            `step`.
        micro_batch_size: rows of a forward pass; halved when memory runs out.
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
        self.micro_batch_size = config.micro_batch_size or 1
        model.train()
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        chunked_loss_(model, engine.compiled(loss_and_slopes_))
        model = engine.wrap(owned_(model))
        self.optimizer = make_optimizer(model, recipe)
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
        self.feed: Iterator[Tensor] = iter(())
        self.step = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._removed_last = False
        self._pending: list[tuple[dict[str, Any], Tensor, Sequence[Removal], Shape]] = []
        self._settled = time.perf_counter()

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

    def train_step(self) -> None:
        """Does one optimizer step, with the removals that are due."""
        step, phase = self.step + 1, self.phase
        lr = self.recipe.lr * self._lr_factor(min(step, self.recipe.total_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, fishers = self._backward(step)
        gradients = [param.grad for param in self.model.parameters() if param.grad is not None]
        norm = self.engine.whole(get_total_norm(gradients))
        before = len(self.pruner.removals)
        self.pruner.fishers = fishers
        self.pruner.score()  # before clipping: the Fisher form is not indifferent to it
        clip_grads_with_norm_(self.model.parameters(), CLIP, norm)
        # the fused AdamW leaves everything as it is where this is 1; the pace and the data go on
        self.optimizer.found_inf = (~(loss + norm).isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step = step
        row = {**self.row(phase), "lr": lr}
        removals = self.pruner.removals[before:]
        self._pending.append((row, torch.stack([loss, norm.to(loss.dtype)]), removals, self.pruner.shape))

    def settle(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics of the steps since the last call; waits for the device.

        Raises:
            TrainingError: after five steps in a row without a finite loss.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return []
        numbers = torch.stack([figures for _, figures, _, _ in pending]).tolist()
        now = time.perf_counter()
        speed = round(len(pending) * self.config.batch_tokens / (now - self._settled), 1)
        self._settled = now
        return [
            self._settle_row({**row, "tokens_per_second": speed}, loss, norm, removals, shape)
            for (row, _, removals, shape), (loss, norm) in zip(pending, numbers, strict=True)
        ]

    def _settle_row(
        self, row: dict[str, Any], loss: float, norm: float, removals: Sequence[Removal], shape: Shape
    ) -> dict[str, Any]:
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.skipped += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        warnings = self.watch.look(loss, norm, self._removed_last) if finite else []
        warnings += self.watch.look_at(removals, shape)
        self._removed_last = bool(removals)
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"the loss or its gradient was not finite in {MOST_SKIPPED} steps in a row (up to step {row['step']})"
            )
        row["loss"] = loss if math.isfinite(loss) else None
        row["grad_norm"] = norm if math.isfinite(norm) else None
        row["skipped"] = self.skipped
        return {**row, "warnings": warnings} if warnings else row

    def begin_timing(self) -> None:
        """Leaves what has been done since the last `settle` out of the next speed: validation, a checkpoint."""
        self._settled = time.perf_counter()

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

    def tensors(self) -> dict[str, Tensor]:
        """Returns weights and moments, each rank's own part, by "model.norm.weight" and "exp_avg:model.norm.weight"."""
        params = dict(self.model.named_parameters())
        moments = {
            f"{field}:{name}": self.optimizer.state[param][field]
            for name, param in params.items()
            for field in MOMENTS
            if param in self.optimizer.state
        }
        return {**params, **moments}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns all else that a resumed run needs, after `settle`: JSON values, and tensors that every rank has."""
        pruner = self.pruner.state_dict()
        extra = {f"average.{kind}": scores for kind, scores in pruner.pop("average").items()}
        extra |= {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
        extra["random.cpu"] = torch.get_rng_state()
        if self.engine.device.type == "cuda":
            extra["random.cuda"] = torch.cuda.get_rng_state(self.engine.device)
        counters = [state["step"] for state in self.optimizer.state.values()]
        state = {
            "step": self.step,
            "optimizer_step": float(counters[0]) if counters else None,  # the same of every parameter
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "removed_last": self._removed_last,
            "micro_batch_size": self.micro_batch_size,
            "pruner": pruner,
            "watch": self.watch.state_dict(),
        }
        return state, extra

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint whose config this Trainer's model was built from."""
        state, extra = checkpoint.state, checkpoint.extra()
        if state["optimizer_step"] is not None:
            for param in self.model.parameters():
                counter = torch.tensor(state["optimizer_step"], dtype=torch.float32, device=param.device)
                self.optimizer.state[param] = {
                    "step": counter,
                    **{field: torch.zeros_like(param, requires_grad=False) for field in MOMENTS},
                }
        checkpoint.load_(self.tensors())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(extra[f"buffer.{name}"])
        average = {
            name.removeprefix("average."): tensor.to(self.engine.device)
            for name, tensor in extra.items()
            if name.startswith("average.")
        }
        self.pruner.load_state_dict({**state["pruner"], "average": average})
        self.watch.load_state_dict(state["watch"])
        self.step, self.skipped = state["step"], state["skipped"]
        self._skipped_in_a_row, self._removed_last = state["skipped_in_a_row"], state["removed_last"]
        self.micro_batch_size = min(self.micro_batch_size, state["micro_batch_size"])
        torch.set_rng_state(extra["random.cpu"])
        if "random.cuda" in extra and self.engine.device.type == "cuda":
            torch.cuda.set_rng_state(extra["random.cuda"], self.engine.device)

    def _backward(self, step: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Returns the loss of a batch, its gradient accumulated in the model, and the Fisher form's F if it is due."""
        engine = self.engine
        batch = next(self.feed)
        # a run may go on with another number of ranks, whose rows the micro-batch size must divide too
        micro_batches = torch.split(batch, math.gcd(self.micro_batch_size, len(batch)))
        scored = self.config.saliency == "fisher" and (self.pruner.is_due(step) or self.config.score_ema > 0)
        fisher = Fisher(self.model, len(micro_batches)) if scored and not self.pruner.done else None
        total = torch.zeros((), device=engine.device)
        for number, rows in enumerate(micro_batches, start=1):
            whole = number == len(micro_batches) or fisher is not None  # a square needs the gradient of all ranks
            with engine.accumulate(self.model, last=whole):
                with engine.autocast():
                    loss = engine.forward(self.model)(input_ids=rows, labels=rows, use_cache=False).loss
                (loss / len(micro_batches)).backward()
            total += loss.detach()
            if fisher:
                fisher.add()
        return engine.mean(total) / len(micro_batches), fisher.finish() if fisher else None


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


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Returns the fused AdamW with weight decay on matrices alone."""
    params = list(model.parameters())
    groups = [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, eps=EPS, fused=True)


def owned_(model: "PreTrainedModel") -> "PreTrainedModel":
    """Moves weights out of the mapped file that they were read from: its alignment would change how sums round."""
    with torch.no_grad():
        for param in model.parameters():
            if not param.is_meta:
                param.data = param.data.clone()
    return model
