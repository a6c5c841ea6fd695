"""One run of `prune`, from its config to its result: loads, trains, logs, saves."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch

from efficientllm.delivery.card import Facts, model_card
from efficientllm.delivery.huggingface import save_model
from efficientllm.delivery.load import empty_model, find_model, load_config, load_model, load_tokenizer
from efficientllm.errors import CheckpointError, ConfigError, EfficientLLMError, TrainingError
from efficientllm.numbers import format_count
from efficientllm.space import Limits, Space, find_limits, find_space
from efficientllm.space.limits import check_target
from efficientllm.training.checkpoint import Checkpoint, last_checkpoint, save_checkpoint
from efficientllm.training.config import FIELDS, RunConfig, flag_name, validate
from efficientllm.training.corpus import Corpus, open_corpus
from efficientllm.training.device import find_device, memory_bytes
from efficientllm.training.evaluate import validation_loss
from efficientllm.training.feed import batches, epochs, mixture, require_batch
from efficientllm.training.folder import check_new, continued, new_folder, stored_config, write_config
from efficientllm.training.interruption import Interruption, exit_on_sigterm
from efficientllm.training.logs import ExternalLog, JsonLines
from efficientllm.training.memory import fitting_micro_batch
from efficientllm.training.progress import Display
from efficientllm.training.recipe import Recipe, make_recipe
from efficientllm.training.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKPOINT_SECONDS = 600.0  # between checkpoints, without --checkpoint-every
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """What is known of the source model without its weights."""

    path: Path
    space: Space
    limits: Limits
    dtype: torch.dtype
    family: str
    tokenizer: "PreTrainedTokenizerBase"


def prune(config: RunConfig, *, resume: bool) -> int:
    """Runs `prune` to its end, or on from its last checkpoint; returns the exit code.

    Raises:
        EfficientLLMError: whatever a person can mend; nothing is half-written.
    """
    validate(config)
    out = Path(config.out).expanduser()
    exit_on_sigterm()
    if resume:
        return _resume(config, out)
    check_new(out)
    source = open_source(config)
    recipe, config = _resolve(config, source)
    model = _initial_model(config)
    display = Display(recipe.total_steps)
    _introduce(display, config, source, recipe)
    with new_folder(out) as staging:
        corpus = _open_corpus(config, source, staging / "data", display)
        write_config(staging, config)
    # the folder has its name now
    corpus = _open_corpus(config, source, out / "data", display)
    return Run(config, out, source, recipe, corpus, display).go(model, None)


def _resume(config: RunConfig, out: Path) -> int:
    stored = stored_config(out)
    config = replace(continued(config, stored), out=str(out))
    more = config.tokens > stored.tokens
    if (out / "model").exists() and not more:
        print(f"{out} is finished: the result is {out / 'model'}; to train on, raise --tokens above {stored.tokens}")
        return 0
    source = open_source(config)
    recipe, config = _resolve(config, source)
    display = Display(recipe.total_steps)
    at_most = make_recipe(stored, source.space, source.limits).decay_start if more else None
    checkpoint = last_checkpoint(out / "checkpoints", at_most, display.warn)
    corpus = _open_corpus(config, source, out / "data", display)
    if checkpoint and checkpoint.state["data"] != corpus.fingerprint:
        raise CheckpointError(f"--resume: the data of {out} has changed since step {checkpoint.step}; bring it back")
    if more:
        _reopen(out, stored, checkpoint)
    write_config(out, config)
    display.say(f"resuming {out} at step {checkpoint.step if checkpoint else 0}")
    model = checkpoint.load_model() if checkpoint else _initial_model(config)
    return Run(config, out, source, recipe, corpus, display).go(model, checkpoint)


def open_source(config: RunConfig) -> Source:
    """Returns the source's space, limits and tokenizer; reads no weights.

    Raises:
        UnsupportedModelError, BudgetError: as `load_config`, `find_space`, `find_limits` and `check_target`.
    """
    model_config = load_config(config.model, config.trust_remote_code)
    space = find_space(empty_model(model_config, config.model))
    limits = find_limits(
        space,
        model_config,
        round_to=config.round_to,
        min_ffn=config.min_ffn,
        min_hidden=config.min_hidden,
        min_kv=config.min_kv,
    )
    check_target(space, limits, config.target_params or 0)
    for size in config.save_at:
        check_target(space, limits, size, "--save-at")
    if config.seq_len > getattr(model_config, "max_position_embeddings", config.seq_len):
        raise ConfigError(
            f"--seq-len {config.seq_len} is above the model's max_position_embeddings "
            f"{model_config.max_position_embeddings}; lower it"
        )
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    stored = getattr(model_config, "dtype", None)
    dtype = DTYPES[config.dtype] if config.dtype else stored if isinstance(stored, torch.dtype) else torch.float32
    path = find_model(config.model, weights=config.init == "pretrained")
    return Source(path, space, limits, dtype, model_config.model_type, tokenizer)


class Run:
    """A run under way: the Trainer with its folder, logs and display."""

    def __init__(
        self, config: RunConfig, out: Path, source: Source, recipe: Recipe, corpus: Corpus, display: Display
    ) -> None:
        self.config, self.out, self.source, self.recipe, self.corpus = config, out, source, recipe, corpus
        self.display = display
        self.metrics = JsonLines(out / "metrics.jsonl")
        self.removals = JsonLines(out / "removals.jsonl")
        self.external = ExternalLog(config.log_to, out, {name: getattr(config, name) for name in FIELDS})
        self.valid_rows = corpus.valid_rows(config.seq_len, config.valid_tokens)
        self.valid_losses: dict[int, float] = {}  # by step

    def go(self, model: "PreTrainedModel", checkpoint: Checkpoint | None) -> int:
        """Trains to the end, or until a signal comes; returns the exit code."""
        try:
            self.trainer = Trainer(model, self.config, self.recipe, self.source.limits, find_device(), self._landed)
            if checkpoint:
                self.trainer.restore(checkpoint)
            begun = self.metrics.cut_back(self.trainer.step if checkpoint else -1)
            self.removals.cut_back(self.trainer.step if checkpoint else -1)
            self.valid_losses = {row["step"]: row["valid_loss"] for row in begun if "valid_loss" in row}
            self._begin_feed()
            with Interruption() as interruption, self.display:
                self._train(interruption)
                if interruption.signal is not None:
                    self._checkpoint()
            if interruption.signal is not None:
                self.display.say(f"stopped at step {self.trainer.step}; go on with: {self._resume_command()}")
                return interruption.exit_code
            self._finish()
            return 0
        except TrainingError as error:
            raise TrainingError(f"{error}; {self._last_good()}") from None
        except OSError as error:
            raise TrainingError(
                f"writing to {self.out} failed ({error.strerror or error}); free space, then: {self._resume_command()}"
            ) from None
        finally:
            for log in (self.metrics, self.removals, self.external):
                log.close()

    def _train(self, interruption: Interruption) -> None:
        trainer, recipe = self.trainer, self.recipe
        if trainer.step == 0:
            self._log(self._validated({**trainer.row(trainer.phase), "epoch": 0.0}))
        saved = time.monotonic()
        while not trainer.done and interruption.signal is None:
            phase = trainer.phase
            before = len(trainer.pruner.removals)
            row = trainer.train_step()
            for removal in trainer.pruner.removals[before:]:
                self.removals.append({**removal.as_row(), "tokens": trainer.tokens})
            row["epoch"] = round(self.epochs_per_row * trainer.step * recipe.batch_rows, 4)
            every = self.config.eval_every
            if trainer.phase != phase or trainer.done or (every and trainer.step % every == 0):
                row = self._validated(row)
            self._log(row)
            for message in row.get("warnings", ()):
                self.display.warn(f"step {trainer.step}: {message}")
            every = self.config.checkpoint_every
            due = trainer.step % every == 0 if every else time.monotonic() - saved > CHECKPOINT_SECONDS
            if due or trainer.done or trainer.step == recipe.decay_start:
                self._checkpoint()
                saved = time.monotonic()

    def _begin_feed(self) -> None:
        parts = self.corpus.parts
        weights = [weight for _, weight in parts]
        folders = [folder for folder, _ in parts]
        own = self.corpus.valid is not None
        rows = mixture(parts, seq_len=self.config.seq_len, seed=self.config.seed, include_valid=own)
        each = epochs(folders, weights, self.config.seq_len, 1, include_valid=own)
        self.epochs_per_row = max(each.values())
        total = self.recipe.total_steps * self.recipe.batch_rows
        for spec, per_row in each.items():
            if self.trainer.step == 0 and per_row * total > 1:
                self.display.warn(f"data {spec} runs out: it is seen {per_row * total:.1f} times, each in a new order")
        start = self.trainer.step * self.recipe.batch_rows
        self.trainer.feed = batches(rows, start, self.recipe.batch_rows)

    def _validated(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the row with the validation loss, if anything is held out."""
        if not self.valid_rows:
            return row
        trainer = self.trainer
        micro_batch_size = self.config.micro_batch_size or 1
        loss = validation_loss(trainer.model, self.valid_rows, micro_batch_size, trainer.autocast)
        self.valid_losses[row["step"]] = loss
        return {**row, "valid_loss": loss}

    def _log(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        self.external.append(row)
        self.display.show(row)

    def _checkpoint(self) -> None:
        self.metrics.sync()
        self.removals.sync()
        state, extra = self.trainer.state()
        state["data"] = self.corpus.fingerprint
        trainer = self.trainer
        save_checkpoint(
            self.out / "checkpoints", trainer.model, trainer.optimizer, state, extra, self.recipe.decay_start
        )

    def _landed(self, size: int) -> None:
        """Saves the rung of a ladder when the Pruner has landed on it, in the middle of a step."""
        if size not in self.config.save_at:
            return
        losses = {"source": self.valid_losses[0]} if 0 in self.valid_losses else {}
        trainer = self.trainer
        if self.valid_rows:
            micro_batch_size = self.config.micro_batch_size or 1
            losses["rung"] = validation_loss(trainer.model, self.valid_rows, micro_batch_size, trainer.autocast)
        tokens = trainer.tokens + self.config.batch_tokens  # of the step that is not over yet
        folder = self.out / "models" / format_count(size)
        self._save(folder, tokens, losses, annealed=size == self.config.target_params and trainer.done)
        self.display.say(f"saved {folder}: {trainer.pruner.num_params:,} parameters")

    def _finish(self) -> None:
        trainer = self.trainer
        trainer.pruner.close()
        steps = sorted(self.valid_losses)
        losses = {"source": self.valid_losses[0], "result": self.valid_losses[steps[-1]]} if len(steps) > 1 else {}
        self._save(self.out / "model", trainer.tokens, losses, annealed=True)
        say = self.display.say
        say(
            f"{self.out / 'model'}: {trainer.pruner.num_params:,} parameters of the source's "
            f"{trainer.pruner.source_params:,} ({_shape_text(trainer.pruner.shape)})"
        )
        if losses:
            after = {step: self.valid_losses[step] for step in steps if step > 0}
            best = min(after, key=lambda step: after[step])
            say(
                f"validation loss: source {losses['source']:.4f}, last {losses['result']:.4f} (step {steps[-1]}), "
                f"best {after[best]:.4f} (step {best})"
            )
        if trainer.skipped:
            say(f"{trainer.skipped} steps were skipped because the loss or its gradient was not finite")

    def _save(self, folder: Path, tokens: int, losses: dict[str, float], annealed: bool) -> None:
        pruner = self.trainer.pruner
        facts = Facts(
            model=self.config.model,
            data=self.config.data,
            params=pruner.num_params,
            source_params=pruner.source_params,
            shape=_shape_words(pruner.shape),
            tokens=tokens,
            losses=losses,
            command=command_line(self.config),
            annealed=annealed,
        )
        save_model(
            self.trainer.model,
            folder,
            tokenizer=self.source.tokenizer,
            source=self.source.path,
            dtype=self.source.dtype,
            card=model_card(facts, self.source.path),
        )

    def _resume_command(self) -> str:
        return f"efficientllm prune --resume --out {quote(self.config.out)}"

    def _last_good(self) -> str:
        checkpoint = last_checkpoint(self.out / "checkpoints")
        step = checkpoint.step if checkpoint else 0
        return f"the last good checkpoint is at step {step}; go on from there with a lower --lr: {self._resume_command()}"


def command_line(config: RunConfig) -> str:
    """Returns the command that makes the same run."""
    words = ["efficientllm", "prune", quote(config.model)]
    for name, each in FIELDS.items():
        value = getattr(config, name)
        if name == "model" or value is None or value == each.default:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [flag_name(name)] if item is True else [flag_name(name), quote(str(item))]
    return " ".join(words)


def _resolve(config: RunConfig, source: Source) -> tuple[Recipe, RunConfig]:
    """Returns the recipe and the config with everything filled in that decides the result."""
    recipe = make_recipe(config, source.space, source.limits)
    micro_batch_size = config.micro_batch_size or fitting_micro_batch(
        source.space,
        source.limits.source,
        rows=recipe.batch_rows,
        seq_len=config.seq_len,
        memory_bytes=memory_bytes(find_device()),
        compensate=config.compensate,
        fisher=config.saliency == "fisher",
        activation_checkpointing=config.activation_checkpointing,
    )
    return recipe, replace(config, lr=recipe.lr, micro_batch_size=micro_batch_size)


def _initial_model(config: RunConfig) -> "PreTrainedModel":
    torch.manual_seed(config.seed)
    if config.init == "pretrained":
        return load_model(config.model, dtype=torch.float32, trust_remote_code=config.trust_remote_code)
    from transformers import AutoModelForCausalLM

    model_config = load_config(config.model, config.trust_remote_code)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    return model


def _open_corpus(config: RunConfig, source: Source, folder: Path, display: Display) -> Corpus:
    def show(spec: str, documents: int, tokens: int) -> None:
        display.console.print(
            f"reading {spec}: {documents:,} documents, {format_count(tokens)} tokens",
            end="\r",
            markup=False,
        )

    corpus = open_corpus(config, source.tokenizer, folder, show if display.console.is_terminal else None)
    folders = [part for part, _ in corpus.parts]
    require_batch(folders, config.batch_tokens, include_valid=corpus.valid is not None)
    return corpus


def _reopen(out: Path, stored: RunConfig, checkpoint: Checkpoint | None) -> None:
    """Makes a run that was shorter ready to go on: its result stays, under its number of tokens."""
    if (out / "model").exists():
        (out / "model").rename(_unused(out / f"model-{format_count(stored.tokens)}"))
    for path in (out / "checkpoints").glob("step-*"):
        if checkpoint is None or path.name > checkpoint.path.name:
            shutil.rmtree(path)


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def _introduce(display: Display, config: RunConfig, source: Source, recipe: Recipe) -> None:
    params = source.space.num_params(source.limits.source)
    target = config.target_params or params
    say = display.say
    say(f"source {config.model}: {source.family}, {params:,} parameters ({_shape_text(source.limits.source)})")
    say(
        f"target {target:,} parameters; {recipe.total_steps} steps of {format_count(config.batch_tokens)} tokens, "
        f"the first {recipe.prune_steps if target < params else 0} of them pruning (warm-up {recipe.warmup_steps})"
    )
    say(
        f"learning rate {recipe.lr:g} ({recipe.lr_reason}), weight decay {recipe.weight_decay:g}, "
        f"micro-batches of {config.micro_batch_size} × {config.seq_len}"
    )
    for kind, note in source.limits.notes.items():
        say(f"{kind}: {note}")
    for remark in recipe.remarks:
        display.warn(remark)
    if getattr(source.tokenizer, "chat_template", None):
        display.warn("the source has a chat template: raw text unlearns its alignment; train on 'messages', or align again")


def _shape_words(shape: dict[str, int]) -> dict[str, int]:
    return {
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_attention_heads": shape["kv"] * shape["query"],
        "num_key_value_heads": shape["kv"],
    }


def _shape_text(shape: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in _shape_words(shape).items())
