"""`efficientllm prune`: checks what can be checked, makes or finds the run folder, starts or continues the run."""

import shutil
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from efficientllm.baselines.shapes import start_config
from efficientllm.config.checks import validate
from efficientllm.config.methods import METHODS
from efficientllm.config.run_config import RunConfig
from efficientllm.data.corpus import Corpus, open_corpus
from efficientllm.data.loader import require_batch
from efficientllm.distributed.checkpoint import Checkpoint, last_checkpoint, open_checkpoint
from efficientllm.distributed.device import (
    default_checkpointing,
    default_precision,
    default_threads,
    find_device,
    memory_bytes,
)
from efficientllm.distributed.engine import Engine
from efficientllm.distributed.host import physical_cores
from efficientllm.distributed.parallel import claim_folder, least_of_ranks, start_engine, started_before
from efficientllm.distributed.rendezvous import is_main_rank
from efficientllm.errors import CheckpointError
from efficientllm.models.load import build_model, empty_model, load_config, load_model
from efficientllm.numbers import counted, format_count
from efficientllm.run.folder import check_new, continued, new_folder, stored_config, write_config
from efficientllm.run.logs import check_installed
from efficientllm.run.progress import Display
from efficientllm.run.session import Run
from efficientllm.run.signals import exit_on_sigterm
from efficientllm.run.source import SourceModel, open_source
from efficientllm.space import Space
from efficientllm.space.dims import widths_text
from efficientllm.training.memory_estimate import (
    PRECISIONS,
    PassSetup,
    default_engine,
    fitting_micro_batch,
    frozen_bytes,
)
from efficientllm.training.recipe import Recipe, make_recipe, rank_rows
from efficientllm.training.teacher import load_teacher, pass_flops, teacher_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune(config: RunConfig, *, resume: bool) -> int:
    """Runs `prune` to its end, or on from its last checkpoint; returns the exit code.

    Raises:
        EfficientLLMError: anything the user can fix; nothing is half-written.
    """
    check_installed(config.log_to)
    out = Path(config.out).expanduser()
    resume = resume or (started_before() and out.exists())
    with exit_on_sigterm():
        return _resume(config, out) if resume else _begin(config, out)


def _begin(config: RunConfig, out: Path) -> int:
    validate(config)
    check_new(out)
    source = open_source(config)
    engine, recipe, config = _decide(config, source)
    model, teacher = _initial_model(config, engine), load_teacher(config, engine)
    display = Display(recipe.total_steps, quiet=not engine.is_main)
    _introduce(display, config, source, recipe, engine)

    def make_folder() -> None:
        with new_folder(out) as staging:
            _open_corpus(config, source, staging / "data", display)
            write_config(staging, config)
        claim_folder()

    engine.run_on_main(make_folder)
    corpus = _open_corpus(config, source, out / "data", display)
    code = Run(config, out, source, recipe, corpus, display, engine).go(model, None, teacher)
    engine.close()
    return code


def _resume(config: RunConfig, out: Path) -> int:
    stored = stored_config(out)
    config = replace(continued(config, stored), out=config.out)
    validate(config)
    more = config.tokens > stored.tokens
    if (out / "model").exists() and not more:
        if is_main_rank():
            print(
                f"{out} is finished: its result is {out / 'model'}; to train it further, raise --tokens above "
                f"{stored.tokens}"
            )
        return 0
    source = open_source(config)
    engine, recipe, config = _decide(config, source)
    display = Display(recipe.total_steps, quiet=not engine.is_main)
    at_most = (
        make_recipe(stored, source.space, source.limits, source.budget, source.num_params).decay_start if more else None
    )
    checkpoint = _agreed_checkpoint(out / "checkpoints", at_most, display, engine)
    corpus = _open_corpus(config, source, out / "data", display)
    if checkpoint and checkpoint.state["data"] != corpus.fingerprint:
        raise CheckpointError(f"--resume: the data of {out} has changed since step {checkpoint.step}; restore it")
    engine.barrier()  # everyone has read what is there

    def change_folder() -> None:
        if more:
            _reopen(out, stored, checkpoint)
        write_config(out, config)
        claim_folder()

    engine.run_on_main(change_folder)
    display.say(f"resuming {out} at step {checkpoint.step if checkpoint else 0}")
    model = empty_model(checkpoint.config(), str(out)) if checkpoint else _initial_model(config, engine)
    teacher = load_teacher(config, engine)
    code = Run(config, out, source, recipe, corpus, display, engine).go(model, checkpoint, teacher)
    engine.close()
    return code


def _decide(config: RunConfig, source: SourceModel) -> tuple[Engine, Recipe, RunConfig]:
    """Returns what this process trains with, the recipe, and the config with everything filled in that was decided."""
    device = find_device()
    params = source.space.num_params(source.limits.source)
    free = least_of_ranks(memory_bytes(device), device)
    precision = config.precision or default_precision(device, params)
    by_size = default_engine(params, free, frozen_bytes(source.teacher, PRECISIONS[precision]))
    name = config.engine or ("fsdp" if config.shards else by_size)
    again = config.activation_checkpointing or default_checkpointing(device, params, precision, config.compile)
    threads = config.threads or default_threads()
    torch.set_num_threads(threads)
    engine = start_engine(name, device, precision, config.compile, config.shards)  # type: ignore[arg-type]
    recipe = make_recipe(config, source.space, source.limits, source.budget, source.num_params)
    rows = rank_rows(config, engine.num_ranks)
    setup = PassSetup.of_run(
        config,
        engine.precision,
        activation_checkpointing=again,
        engine=engine.name,
        shards=engine.shards,
        teacher=source.teacher,
        device=engine.device.type,
    )
    micro_batch_size = config.micro_batch_size or fitting_micro_batch(
        source.space, source.limits.source, setup, rows=rows, memory_bytes=free
    )
    found = {
        "lr": recipe.lr,
        "micro_batch_size": micro_batch_size,
        "precision": precision,
        "activation_checkpointing": again,
        "threads": threads,
    }
    return engine, recipe, replace(config, **found)  # type: ignore[arg-type]


def _agreed_checkpoint(folder: Path, at_most: int | None, display: Display, engine: Engine) -> Checkpoint | None:
    """Returns the checkpoint that the main rank finds; it alone reads all of it to see that it is whole."""
    found: Checkpoint | None = engine.run_on_main(lambda: last_checkpoint(folder, at_most, display.warn))
    (step,) = engine.all_reduce_max(found.step if found else -1)
    return found or (open_checkpoint(folder, step) if step >= 0 else None)


def _initial_model(config: RunConfig, engine: Engine) -> "PreTrainedModel":
    torch.manual_seed(config.seed)
    if config.init == "pretrained" and config.method != "scratch":
        # what FSDP takes its rows from stays mapped from the file: one copy for all ranks of a machine
        dtype = None if engine.name == "fsdp" else torch.float32
        return load_model(config.model, dtype=dtype, trust_remote_code=config.trust_remote_code)
    fresh = start_config(config) if config.method == "scratch" else load_config(config.model, config.trust_remote_code)
    return build_model(fresh, torch.float32)


def _open_corpus(config: RunConfig, source: SourceModel, folder: Path, display: Display) -> Corpus:
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
    """Prepares a run that was shorter to continue: its result stays, under its number of tokens."""
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


def _introduce(display: Display, config: RunConfig, source: SourceModel, recipe: Recipe, engine: Engine) -> None:
    params = source.space.num_params(source.limits.source)
    rows = gcd(
        config.micro_batch_size or 1, rank_rows(config, engine.num_ranks)
    )  # a rank may have fewer than asked for
    budget = source.budget
    prunes = budget.target < budget.measure(source.limits.source)
    say = display.say
    method, shape = METHODS[config.method], widths_text(source.limits.source)
    begins = f" (starts with {params:,} parameters: {shape})" if method.when == "initial" else ""
    say(f"source {config.model}: {source.family}, {source.num_params:,} parameters" + ("" if begins else f" ({shape})"))
    if config.method != "efficientllm":
        say(f"method {config.method}, which {method.does}{begins}")
    say(
        f"target {budget.text}; {recipe.total_steps} steps of {format_count(config.batch_tokens)} tokens, "
        f"the first {recipe.prune_steps if prunes else 0} of them pruning (warm-up {recipe.warmup_steps})"
    )
    say(
        f"learning rate {recipe.lr:g} ({recipe.lr_reason}), weight decay {recipe.weight_decay:g}, "
        f"micro-batches of {rows} × {config.seq_len}"
    )
    if source.teacher:
        say(_teacher_text(config, source, source.teacher))
    threads = f", {counted(config.threads or default_threads(), 'thread')}" if engine.device.type == "cpu" else ""
    say(f"{engine.device.type}, {engine.precision}{threads}{', compiled' if engine.compiles else ''}")
    if engine.num_ranks > 1:
        say(f"{engine.num_ranks} ranks, {engine.name}")
    elif config.engine or config.shards:
        flag = f"--engine {config.engine}" if config.engine else f"--shards {config.shards}"
        display.warn(f"{flag} is ignored in a single process; start N with torchrun --nproc-per-node N -m efficientllm")
    if config.threads and engine.device.type == "cpu" and config.threads > physical_cores():
        display.warn(
            f"--threads {config.threads}: this process may use only {counted(physical_cores(), 'physical core')}; "
            "threads beyond that slow each other down"
        )
    for kind, note in source.limits.notes.items():
        say(f"{kind}: {note}")
    for remark in recipe.remarks:
        display.warn(remark)
    if getattr(source.tokenizer, "chat_template", None):
        display.warn(
            "the source has a chat template, and training on raw text undoes its alignment; train on 'messages', or "
            "align the result again"
        )


def _teacher_text(config: RunConfig, source: SourceModel, teacher: Space) -> str:
    """Returns what the teacher is, what the loss is made of, and what its passes cost."""
    weight, temperature, hidden = config.distill_weight, config.distill_temperature, config.distill_hidden
    terms = f"{1 - weight:g} CE + {weight * temperature**2:g} KL at temperature {temperature:g}"
    terms += f" + {hidden:g} distance of last hidden states" if hidden else ""
    share = pass_flops(teacher, config.seq_len) / source.space.flops_per_token(source.limits.source, config.seq_len)
    end = share * source.budget.measure(source.limits.source) / source.budget.target
    return (
        f"teacher {teacher_name(config)}: {teacher.num_params(teacher.shape):,} parameters, frozen; loss = {terms}; "
        f"its passes cost {share:.0%} of a step's FLOPs at the source's size, about {end:.0%} at the target's"
    )
