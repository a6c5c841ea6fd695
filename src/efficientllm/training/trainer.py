"""The loop: continued pretraining of a model that a Pruner makes smaller."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import get_wsd_schedule

from efficientllm.config.methods import METHODS
from efficientllm.config.run_config import RunConfig
from efficientllm.distributed.checkpoint import Checkpoint
from efficientllm.distributed.device import is_out_of_memory
from efficientllm.distributed.engine import Engine
from efficientllm.errors import TrainingError
from efficientllm.numbers import counted
from efficientllm.pruning import Pruner
from efficientllm.space import Limits
from efficientllm.space.dims import widths
from efficientllm.training.cross_entropy import cross_entropy_and_grad_
from efficientllm.training.failure_signs import FailureSigns
from efficientllm.training.fisher import Fisher
from efficientllm.training.loss import chunked_loss_
from efficientllm.training.memory_estimate import divisors
from efficientllm.training.metrics import Metrics
from efficientllm.training.recipe import FINAL_LR, Recipe
from efficientllm.training.recompute import checkpoint_
from efficientllm.training.size_target import Budget
from efficientllm.training.teacher import PARTS, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BETAS, EPS = (0.9, 0.95), 1e-8
CLIP = 1.0
MOMENTS = ("exp_avg", "exp_avg_sq")
NEVER = 2**62  # units that would have to wait for a compaction


class Trainer:
    """A model, its optimizer and Pruner, and how far they have come.

    Steps in which nothing is removed never wait for the device.

    Attributes:
        step: steps done, those skipped for a loss that is not finite included.
        metrics: the figures of the steps done.
        batches: this rank's part of the batches, token ids (rows, seq_len) on the device, set by the caller to start at
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
        budget: Budget | None = None,
        teacher: "PreTrainedModel | None" = None,
    ) -> None:
        self.config, self.recipe, self.engine = config, recipe, engine
        self.micro_batch_size = config.micro_batch_size or 1
        model.train()
        checkpoint_(model, config.activation_checkpointing or "none")
        chunked_loss_(model, engine.compiled(cross_entropy_and_grad_))
        model = engine.wrap(model)
        self.teacher = Teacher(teacher, config, engine) if teacher is not None else None
        self.optimizer = make_optimizer(model, recipe)
        self._lr_factor = get_wsd_schedule(
            self.optimizer,
            num_warmup_steps=recipe.warmup_steps,
            num_decay_steps=recipe.decay_steps,
            num_training_steps=recipe.total_steps,
            min_lr_ratio=FINAL_LR,
            decay_type="linear",
        ).lr_lambdas[0]
        target = budget.target if budget else config.target_params
        method = METHODS[config.method]
        assert target is not None
        self.pruner = Pruner(
            model,
            self.optimizer,
            target,
            measure=budget.measure if budget else None,
            pace=recipe.pace,
            saliency=config.saliency,  # type: ignore[arg-type]
            score=config.scored_layers,  # type: ignore[arg-type]
            score_ema=config.score_ema,
            compensate=config.compensate or method.compensates,
            per_layer=config.layout == "per-layer",
            limits=limits,
            save_at=config.save_at,
            on_landing=on_landing,
            compaction_tile=engine.compaction_tile if method.compacts else NEVER,
            placement=engine,
        )
        params, size = self.pruner.source_params, self.pruner.source_size
        watch = FailureSigns(limits, params - params * target // size)
        self.metrics = Metrics(watch, config.batch_tokens)
        self.batches: Iterator[Tensor] = iter(())
        self.step = 0
        self._notes: list[str] = []  # warnings of the step under way

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
        figures, fishers = self._backward(step)
        loss, *parts = figures  # the saliency's gradients are those of all of the loss
        gradients = [param.grad for param in self.model.parameters() if param.grad is not None]
        norm = self.engine.full_tensor(get_total_norm(gradients))
        before = len(self.pruner.removals)
        self.pruner.scorer.fishers = fishers
        self.pruner.score()  # before clipping: the Fisher form is not indifferent to it
        clip_grads_with_norm_(self.model.parameters(), CLIP, norm)
        # the fused AdamW leaves everything as it is where this is 1; the pace and the data continue
        self.optimizer.found_inf = (~(loss + norm).isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step = step
        row = {**self.row(phase), "lr": lr, "warnings": self._notes}
        self._notes = []
        named = dict(zip(PARTS, parts, strict=False))  # the last one needs --distill-hidden
        self.metrics.add(row, loss, norm, self.pruner.removals[before:], self.pruner.shape, named)

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Holds the gradient of the next batch in the model meanwhile, and takes no step by it."""
        _, self.pruner.scorer.fishers = self._backward(self.step + 1)
        yield
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def phase(self) -> str:
        return "train" if self.pruner.done else "prune"

    def row(self, phase: str) -> dict[str, Any]:
        """Returns the state of the run, as a row of metrics without the figures of a step."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "phase": phase,
            "loss": None,
            "lr": None,
            "grad_norm": None,
            "skipped": self.metrics.skipped,
            "params": self.pruner.num_params,
            **widths(self.pruner.shape),
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
        """Returns all else that a resumed run needs, once nothing is pending: JSON values, and tensors."""
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
            "micro_batch_size": {"given": self.config.micro_batch_size, "used": self.micro_batch_size},
            "pruner": pruner,
            "metrics": self.metrics.state_dict(),
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
            name.removeprefix("average."): tensor for name, tensor in extra.items() if name.startswith("average.")
        }
        self.pruner.load_state_dict({**state["pruner"], "average": average})
        self.metrics.load_state_dict(state["metrics"])
        self.step = state["step"]
        if state["micro_batch_size"]["given"] == self.config.micro_batch_size:  # else a flag has changed it
            self.micro_batch_size = state["micro_batch_size"]["used"]
        torch.set_rng_state(extra["random.cpu"])
        if "random.cuda" in extra and self.engine.device.type == "cuda":
            torch.cuda.set_rng_state(extra["random.cuda"], self.engine.device)

    def _backward(self, step: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Returns a batch's loss and its parts, the gradient accumulated in the model, and the Fisher form's F if due.

        Raises:
            TrainingError: if memory runs out among several ranks, or with a single row.
        """
        batch = next(self.batches)
        while True:
            try:
                return self._passes(batch, step)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # not in the handler: its traceback keeps the pass that failed, with all its activations
            self._halve(len(batch))

    def _halve(self, rows: int) -> None:
        """Makes the micro-batches half as large and forgets the pass that was too large."""
        size = math.gcd(self.micro_batch_size, rows)
        smaller = max((each for each in divisors(rows) if 2 * each <= size), default=0)
        found = f"out of memory with {counted(size, 'row')} of {self.config.seq_len} tokens per pass"
        if not smaller:
            ways = ["more ranks with --engine fsdp"]
            if self.config.activation_checkpointing != "full":
                ways.insert(0, "--activation-checkpointing full")
            less = ", or remove --distill" if self.teacher else ""
            raise TrainingError(f"{found}; use {' or '.join(ways)}{less}")
        if self.engine.num_ranks > 1:  # the others wait for a sum that this rank will not come to
            raise TrainingError(
                f"rank {self.engine.rank} is {found}; continue with --micro-batch-size {smaller}", one_rank=True
            )
        self.micro_batch_size = smaller
        self._notes.append(f"{found}; continuing with {smaller}")
        self.optimizer.zero_grad(set_to_none=True)
        self.pruner.forget_inputs()
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def _passes(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        engine = self.engine
        # a run may continue with another number of ranks, whose rows the micro-batch size must divide too
        micro_batches = torch.split(batch, math.gcd(self.micro_batch_size, len(batch)))
        scored = self.config.saliency == "taylor2" and (self.pruner.is_due(step) or self.config.score_ema > 0)
        fisher = Fisher(self.model, len(micro_batches)) if scored and not self.pruner.done else None
        total = torch.zeros(1, device=engine.device)
        if self.teacher and self.config.distill_hidden is not None:
            self.teacher.follow(self.pruner.source_units("hidden"))
        for number, rows in enumerate(micro_batches, start=1):
            whole = number == len(micro_batches) or fisher is not None  # a square needs the gradient of all ranks
            with engine.accumulate(self.model, last=whole):
                loss, parts = self._loss(rows)
                (loss / len(micro_batches)).backward()
            total = total + torch.cat([loss.detach()[None], parts])
            if fisher:
                fisher.add()
        return engine.all_reduce_mean(total) / len(micro_batches), fisher.finish() if fisher else None

    def _loss(self, rows: Tensor) -> tuple[Any, Tensor]:
        """Returns the loss of a micro-batch, and its parts if there is a teacher."""
        targets = self.teacher.targets(rows) if self.teacher else None  # before the pass whose activations must stay
        with self.engine.autocast():
            output = self.engine.forward(self.model)(input_ids=rows, labels=rows, targets=targets, use_cache=False)
        return output if targets else (output.loss, output.loss.new_empty(0))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Returns the fused AdamW with weight decay on matrices alone."""
    params = list(model.parameters())
    groups = [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, eps=EPS, fused=True)
