"""A run under way: trains, validates, logs and checkpoints until it is done or asked to stop, and writes the result."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from math import ceil
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from efficientllm.baselines.depth import remove_layers_
from efficientllm.baselines.one_shot import num_batches, remove_one_shot
from efficientllm.config.command_line import program
from efficientllm.config.methods import METHODS
from efficientllm.config.run_config import FIELDS, RunConfig
from efficientllm.data.corpus import Corpus
from efficientllm.data.loader import Loader
from efficientllm.distributed.checkpoint import Checkpoint, Checkpoints, last_checkpoint
from efficientllm.distributed.device import held_memory, is_out_of_memory
from efficientllm.distributed.engine import Engine, twin
from efficientllm.errors import TrainingError
from efficientllm.numbers import counted, format_count
from efficientllm.pruning import Removal
from efficientllm.run.logs import ExternalLog, JsonLines, read_rows
from efficientllm.run.progress import Display
from efficientllm.run.result import save_result
from efficientllm.run.signals import Interruption
from efficientllm.run.source import SourceModel
from efficientllm.space.dims import widths_text
from efficientllm.training.loss import chunked_loss_
from efficientllm.training.recipe import Recipe
from efficientllm.training.trainer import Trainer
from efficientllm.training.validation import validation_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINT_SECONDS = 600.0  # between checkpoints, without --checkpoint-every
SETTLE_STEPS = 10  # steps on a GPU between reads of what it has computed; on a CPU every step is read


class Run:
    """A run under way: the Trainer with its folder, logs and display."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        source: SourceModel,
        recipe: Recipe,
        corpus: Corpus,
        display: Display,
        engine: Engine,
    ) -> None:
        self.config, self.out, self.source, self.recipe, self.corpus = config, out, source, recipe, corpus
        self.display, self.engine = display, engine
        logs = out if engine.is_main else None
        self.metrics = JsonLines(logs / "metrics.jsonl" if logs else None)
        self.removals = JsonLines(logs / "removals.jsonl" if logs else None)
        self.external = ExternalLog(
            config.log_to if logs else None, out, {name: getattr(config, name) for name in FIELDS}
        )
        self.loader = Loader(
            corpus.parts,
            seq_len=config.seq_len,
            batch_rows=recipe.batch_rows,
            seed=config.seed,
            include_valid=corpus.valid is not None,
        )
        self.valid_rows = corpus.valid_rows(config.seq_len, config.valid_tokens)
        self.valid_losses: dict[int, float] = {}  # by step
        self.saved_step = -1
        self.first_row: dict[str, Any] = {}  # what is known of the source when another model is trained
        self.layer_removals: list[Removal] = []
        self.settle_steps = 1 if engine.device.type == "cpu" else SETTLE_STEPS

    def go(
        self, model: "PreTrainedModel", checkpoint: Checkpoint | None, teacher: "PreTrainedModel | None" = None
    ) -> int:
        """Trains to the end, or until a signal comes; returns the exit code."""
        self.checkpoints = Checkpoints(self.out / "checkpoints", self.recipe.decay_start)
        try:
            if checkpoint is None and self.config.method == "depth":
                self._remove_layers(model)
            self.trainer = Trainer(
                model,
                self.config,
                self.recipe,
                self.source.limits,
                self.engine,
                self._landed,
                self.source.budget,
                teacher,
            )
            if checkpoint:
                self.trainer.restore(checkpoint)
            begun = self.trainer.step if checkpoint else -1
            rows = [row for row in read_rows(self.out / "metrics.jsonl") if row["step"] <= begun]
            self.valid_losses |= {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}
            self.engine.barrier()  # every rank has read
            self.metrics.cut_back(begun)
            self.removals.cut_back(begun)
            self._begin_loading()
            with Interruption() as interruption, self.display:
                stopped_by = self._train(interruption)
                if stopped_by:
                    self._checkpoint()
                self.checkpoints.finish()
                self.engine.barrier()  # the last one has its name
            if stopped_by:
                self.display.say(f"stopped at step {self.trainer.step}; continue with: {self._resume_command()}")
                return 128 + stopped_by
            self._finish()
            return 0
        except TrainingError as error:
            raise TrainingError(f"{error}; {self._last_good()}", one_rank=error.one_rank) from None
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"writing to {self.out} failed ({error}); free up space, then run: {self._resume_command()}"
            ) from None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"rank {self.engine.rank} is out of memory outside the training passes; use more ranks with --engine "
                f"fsdp; {self._last_good()}",
                one_rank=True,
            ) from None
        finally:
            for log in (self.metrics, self.removals, self.external):
                log.close()

    def _train(self, interruption: Interruption) -> int:
        """Trains until the run is done; returns 0, or the number of the signal that stopped it before."""
        trainer, recipe, config = self.trainer, self.recipe, self.config
        if trainer.step == 0:
            self._log(self._begun())
        saved = time.monotonic()
        signal = 0
        trainer.metrics.begin_timing()
        while not trainer.done and not signal:
            phase, removed = trainer.phase, len(trainer.pruner.removals)
            trainer.train_step()
            step, removals = trainer.step, trainer.pruner.removals[removed:]
            self._log_removals(removals)
            validates = trainer.phase != phase or trainer.done or _divides(config.eval_every, step)
            saves = trainer.done or step == recipe.decay_start or _divides(config.checkpoint_every, step)
            # a signal or the clock may reach one rank before another: what counts is what they agree on
            late = not config.checkpoint_every and time.monotonic() - saved > CHECKPOINT_SECONDS
            signal, overdue = self.engine.all_reduce_max(interruption.signal, late)
            if not (removals or validates or saves or overdue or signal or step % self.settle_steps == 0):
                continue  # nothing waits for the device
            *rows, last = trainer.metrics.settle()
            memory = held_memory(self.engine.device)
            for row in [*rows, self._validated(last) if validates else last]:
                epoch = round(max(self.loader.epochs(row["step"]).values()), 4)
                self._log({**row, "epoch": epoch, "memory_bytes": memory})
                for message in row.get("warnings", ()):
                    self.display.warn(f"step {row['step']}: {message}")
            trainer.metrics.check()
            if saves or overdue:
                self._checkpoint()
                saved = time.monotonic()
            self.checkpoints.poll()
            trainer.metrics.begin_timing()
        return signal

    def _begun(self) -> dict[str, Any]:
        """Returns the row of step 0, the source's, when all has gone that goes before the first step."""
        trainer, removals = self.trainer, self.layer_removals
        row = {**trainer.row(trainer.phase), "epoch": 0.0}
        if self.display.warned:
            row["warnings"] = self.display.warned
        row = row | self.first_row if self.first_row else self._validated(row)
        if METHODS[self.config.method].when == "one-shot":
            trainer.batches = self._batches(0)
            remove_one_shot(trainer, self.source.budget, self.display.calibrating)
            trainer.batches = self._batches(0)
            removals = trainer.pruner.removals
        if removals:
            self._log_removals(removals)
            self.display.say(f"removed before the first step: {trainer.pruner.num_params:,} parameters are left")
            if self.valid_rows:
                row["removed_valid_loss"] = self._valid_loss()
        return row

    def _remove_layers(self, model: "PreTrainedModel") -> None:
        """Takes layers out of a source that has been read and not begun to train; validates it before."""
        rows, engine, config = self.config.micro_batch_size or 1, self.engine, self.config
        whole = twin(model)
        chunked_loss_(whole)
        whole = engine.wrap(whole)
        self.first_row["params"] = self.source.num_params
        if self.valid_rows:
            self.valid_losses[0] = validation_loss(whole, self.valid_rows, rows, engine)
            self.first_row["valid_loss"] = self.valid_losses[0]
        calibration = list(islice(self._batches(0), num_batches(config)))
        left = self.source.space.num_layers
        self.layer_removals = remove_layers_(model, whole, calibration, left, rows, engine)

    def _log_removals(self, removals: Sequence[Removal]) -> None:
        for removal in removals:
            self.removals.append({**removal.as_row(), "tokens": self.trainer.tokens})

    def _begin_loading(self) -> None:
        """Lets the batches begin after the steps done; warns at the beginning if a source will be seen again."""
        if self.trainer.step == 0:
            for spec, times in self.loader.epochs(self.recipe.total_steps).items():
                if times > 1:
                    self.display.warn(
                        f"data {spec} runs out: it is read {ceil(10 * times) / 10:g} times, each in a new order"
                    )
        self.trainer.batches = self._batches(self.trainer.step)

    def _batches(self, step: int) -> Iterator[torch.Tensor]:
        """Returns this rank's parts of the batches after a step."""
        return self.loader.after(step, self.engine.device, self.engine.rank, self.engine.num_ranks)

    def _validated(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the row with the validation loss, if anything is held out."""
        if not self.valid_rows:
            return row
        self.valid_losses[row["step"]] = loss = self._valid_loss()
        return {**row, "valid_loss": loss}

    def _valid_loss(self) -> float:
        trainer = self.trainer
        return validation_loss(trainer.model, self.valid_rows, trainer.micro_batch_size, self.engine)

    def _log(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        self.external.append(row)
        self.display.show(row)

    def _checkpoint(self) -> None:
        if self.saved_step == self.trainer.step:  # a signal came while this step was being saved
            return
        self.saved_step = self.trainer.step
        self.metrics.sync()
        self.removals.sync()
        trainer = self.trainer
        state, extra = trainer.state()
        state["data"] = self.corpus.fingerprint
        self.checkpoints.save(self.engine.checkpoint_shard(trainer.tensors()), state, extra, trainer.model.config)

    def _landed(self, size: int) -> None:
        """Saves the saved_size of a ladder when the Pruner has landed on it, in the middle of a step."""
        if size not in self.config.save_at:
            return
        losses = {"source": self.valid_losses[0]} if 0 in self.valid_losses else {}
        trainer = self.trainer
        if self.valid_rows:
            losses["saved_size"] = self._valid_loss()
        tokens = trainer.tokens + self.config.batch_tokens  # of the step that is not over yet
        folder = self.out / "models" / format_count(size)
        self._save(folder, tokens, losses, annealed=size == self.config.target_params and trainer.done)
        self.display.say(f"saved {folder}: {trainer.pruner.num_params:,} parameters")

    def _finish(self) -> None:
        trainer = self.trainer
        trainer.pruner.close()
        steps = sorted(self.valid_losses)
        begun = "fresh weights" if self.config.method == "scratch" else "source"
        losses = {begun: self.valid_losses[0], "result": self.valid_losses[steps[-1]]} if 0 in steps[:-1] else {}
        self._save(self.out / "model", trainer.tokens, losses, annealed=True)
        say = self.display.say
        say(
            f"{self.out / 'model'}: {trainer.pruner.num_params:,} parameters of the source's "
            f"{self.source.num_params:,} ({widths_text(trainer.pruner.shape)})"
        )
        if file := self.source.budget.file:
            say(
                f"its {file.type} file takes {file(trainer.pruner.shape):,} bytes; export it with: {program()} export "
                f"{quote(self.config.out)} --to gguf --type {file.type} --out {quote(self.out.name)}.gguf"
            )
        if losses:
            after = {step: self.valid_losses[step] for step in steps if step > 0}
            best = min(after, key=lambda step: after[step])
            say(
                f"validation loss: {begun} {losses[begun]:.4f}, last {losses['result']:.4f} (step {steps[-1]}), "
                f"best {after[best]:.4f} (step {best})"
            )
        if self.engine.compiles:
            say(f"compiled {counted(self.engine.compilations, 'graph')}")
        if trainer.metrics.skipped:
            say(f"skipped {counted(trainer.metrics.skipped, 'step')} because the loss or its gradient was not finite")

    def _save(self, folder: Path, tokens: int, losses: dict[str, float], annealed: bool) -> None:
        save_result(folder, self.trainer, self.source, tokens=tokens, losses=losses, annealed=annealed)

    def _resume_command(self) -> str:
        return f"{program()} prune --resume --out {quote(self.config.out)}"

    def _last_good(self) -> str:
        with suppress(OSError, RuntimeError):
            self.checkpoints.finish()
        checkpoint = last_checkpoint(self.out / "checkpoints")
        if checkpoint is None:
            return f"no checkpoint has been written yet; start again with: {self._resume_command()}"
        return (
            f"the last good checkpoint is at step {checkpoint.step}; continue from there with: {self._resume_command()}"
        )


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
