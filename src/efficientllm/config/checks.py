"""What no run can have: values and combinations of flags that are refused before anything is read."""

import math

from efficientllm.config.methods import LIMITED, METHODS
from efficientllm.config.run_config import FIELDS, PACES, RunConfig, flag_name, nearest
from efficientllm.errors import ConfigError


def validate(config: RunConfig, complete: bool = True) -> None:
    """Checks what needs no model. Without `complete` (a plan, a printout) what is not given is not missed.

    Raises:
        ConfigError: a value or combination that no run can have.
    """
    _check_values(config)
    _check_method(config)
    if complete:
        for name in ("model", "data", "target_params", "tokens", "out"):
            if name == "target_params" and (config.target_bytes is not None or config.shape_of is not None):
                continue
            if not getattr(config, name) and name != "model":
                example = f"{flag_name(name)} {FIELDS[name].metadata['metavar']}"
                raise ConfigError(f"{flag_name(name)} is missing; add {example}, or '{name}' to the --config file")
            if not getattr(config, name):
                raise ConfigError("MODEL is missing; name a folder or hub id")
        check_shards(config)
    if config.layout == "per-layer" and config.compile:
        raise ConfigError(
            "--compile shares one graph among all layers, but with --layout per-layer every layer would need its own "
            "after every compaction; remove one of the two"
        )
    _check_target(config)
    _check_distill(config)
    given = [name for name in PACES if getattr(config, name) is not None]
    if len(given) > 1 or (complete and not given and METHODS[config.method].when == "gradual"):
        found = " and ".join(flag_name(name) for name in given) or "none of them"
        raise ConfigError(
            f"exactly one of --prune-tokens, --slot-steps, --removals-per-step must set the pace, found {found}; give "
            "one"
        )
    if config.prune_tokens is not None and config.tokens and config.prune_tokens > config.tokens:
        raise ConfigError(
            f"--prune-tokens {config.prune_tokens} is above --tokens {config.tokens}, the whole run; "
            f"raise --tokens or lower --prune-tokens"
        )
    if config.batch_tokens % config.seq_len:
        near = max(config.batch_tokens // config.seq_len, 1) * config.seq_len
        raise ConfigError(
            f"--batch-tokens {config.batch_tokens} is not a multiple of --seq-len {config.seq_len}; try {near}"
        )
    rows = config.batch_tokens // config.seq_len
    if config.micro_batch_size is not None and rows % config.micro_batch_size:
        near = max(size for size in range(1, min(rows, config.micro_batch_size) + 1) if rows % size == 0)
        raise ConfigError(
            f"--micro-batch-size {config.micro_batch_size} does not divide the {rows} rows of a batch "
            f"(--batch-tokens over --seq-len); try --micro-batch-size {near}"
        )
    for size in config.save_at:
        if config.target_params is not None and size < config.target_params:
            raise ConfigError(
                f"--save-at {size} is below --target-params {config.target_params}, where the run ends; "
                f"give a size between source and target"
            )


def check_shards(config: RunConfig) -> None:
    """Raises ConfigError if copies are to be shared under an engine where every rank has its own."""
    if config.shards is not None and config.engine == "ddp":
        raise ConfigError(
            f"--shards {config.shards} needs --engine fsdp, but --engine ddp keeps a full copy on every rank; remove "
            "one of the two"
        )


def _check_target(config: RunConfig) -> None:
    if config.target_bytes is None:
        return
    if config.target_params is not None:
        raise ConfigError("--target-params and --target-bytes both set the target size; give only one")
    if config.for_type is None:
        raise ConfigError(
            "--target-bytes needs --for, the GGUF type whose file it measures, such as --for q8_0 or --for q4_0"
        )
    if config.save_at:
        raise ConfigError(
            f"--save-at {config.save_at[0]} counts parameters but --target-bytes counts bytes, so their order is "
            "unknown; remove --save-at, or give --target-params instead"
        )


def _check_distill(config: RunConfig) -> None:
    if not 0 <= config.distill_weight <= 1:
        raise ConfigError(
            f"--distill-weight {config.distill_weight} is not between 0 and 1; 1 means the teacher's loss alone"
        )
    for name in ("distill_weight", "distill_temperature", "distill_hidden"):
        if config.distill is None and getattr(config, name) != FIELDS[name].default:
            raise ConfigError(
                f"{flag_name(name)} {getattr(config, name)} is used only with --distill; add --distill or remove it"
            )


def _check_values(config: RunConfig) -> None:
    for name, each in FIELDS.items():
        value, choices = getattr(config, name), each.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ConfigError(
                f"{flag_name(name)} {value} is not one of {', '.join(choices)}; did you mean {nearest(value, choices)}?"
            )
        if name == "score_ema":
            if not 0 <= value < 1:
                raise ConfigError(f"--score-ema {value} must be at least 0 and below 1; 0 turns the moving average off")
            continue
        if name == "distill_weight":  # 0 is a value
            continue
        least = 0 if name == "seed" else 1
        if name == "tokens" and value == 0:  # not given
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool | str | None):
                continue
            if isinstance(number, int) and number < least:
                raise ConfigError(
                    f"{flag_name(name)} {number} is below {least}; give a whole number of at least {least}"
                )
            if not (math.isfinite(number) and number >= 0 and (number > 0 or least == 0)):
                raise ConfigError(f"{flag_name(name)} {number} is not above 0; give a finite number above 0")


def _check_method(config: RunConfig) -> None:
    """Raises ConfigError if a flag does not apply to the method, or contradicts another one."""
    method = METHODS[config.method]
    for name in LIMITED:
        value = getattr(config, name)
        if value != FIELDS[name].default and name not in method.takes:
            raise ConfigError(
                f"{flag_name(name)} does not apply to --method {config.method}, which {method.does}; remove it"
            )
    if config.method == "scratch" and config.shape_of is None:
        raise ConfigError(
            "--method scratch needs --shape-of; name a run, or a folder with config.json, whose shape to use"
        )
    for name in ("target_params", "target_bytes", "allocation"):
        if config.shape_of is not None and getattr(config, name) is not None:
            raise ConfigError(f"--shape-of already sets every size of the result; remove it or {flag_name(name)}")
