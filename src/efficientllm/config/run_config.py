"""What a run is: every flag of `prune` with its default, read from flags and YAML alike. Imports no torch."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from efficientllm.config.methods import METHODS
from efficientllm.errors import ConfigError
from efficientllm.numbers import parse_bytes, parse_count

AUTO = ("micro_batch_size", "round_to")  # flags that say so for what they are without a value
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q4_k_m", "q5_k_m", "q6_k")
KEYWORDS = {"for": "for_type"}  # flags that are no names in Python, and their fields
OLD_NAMES = {"score": "scored_layers"}  # what fields were called; flags, YAML and run folders may still say so
OLD_VALUES = {"saliency": {"first": "taylor1", "fisher": "taylor2"}}
SOURCE = "source"  # the teacher that --distill without a value means
CHECKPOINTING = ("none", "selective", "full")  # from the most memory to the least
PACES = ("prune_tokens", "slot_steps", "removals_per_step")


def _flag(
    default: Any, help: str, metavar: str | None = "N", choices: tuple[str, ...] = (), bare: str | None = None
) -> Any:
    """A field and its flag; `bare` is what the flag means without a value, if it may stand so."""
    metadata = {"help": help, "metavar": "|".join(choices) or metavar, "choices": choices, "bare": bare}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One `prune` run. Counts are plain integers; None means: derived from the model or the machine."""

    model: str = _flag("", "folder or hub id of the source model", "MODEL")
    data: tuple[str, ...] = _flag((), "file, folder or hub data set, with =WEIGHT in a mixture (repeat)", "DATA")
    target_params: int | None = _flag(None, "parameters to end with, such as 134M")
    target_bytes: int | None = _flag(None, "bytes of the GGUF file to end with, such as 120MB; with --for", "SIZE")
    for_type: str | None = _flag(None, "type of the GGUF file that the result is for", choices=GGUF_TYPES)
    out: str = _flag("", "run folder to write", "RUN")
    prune_tokens: int | None = _flag(None, "pace: tokens of the pruning phase")
    tokens: int = _flag(0, "all tokens of the run, the pruning phase included")
    valid: str | None = _flag(None, "validation data (default: 0.5%% of the documents)", "DATA")
    valid_tokens: int = _flag(1_000_000, "most tokens to validate on")
    text_field: str = _flag("text", "field of a row that holds the text", "NAME")
    txt_split: str = _flag("file", "what a document is in a .txt", choices=("line", "blank", "file"))
    document_separator: str | None = _flag(
        None, "token around a document (default: bos if there is one, else eos)", choices=("bos", "eos", "both", "none")
    )
    seq_len: int = _flag(2048, "tokens of a row")
    batch_tokens: int = _flag(2**20, "tokens of an optimizer step")
    micro_batch_size: int | None = _flag(None, "rows of a forward pass (default: auto, the most that fit)")
    lr: float | None = _flag(None, "peak learning rate (default: by the source's size)", "X")
    seed: int = _flag(0, "seed of data order and initial weights")
    init: str = _flag("pretrained", "weights to start from", choices=("pretrained", "scratch"))
    method: str = _flag("efficientllm", "how the model becomes small (docs/methods.md)", choices=tuple(METHODS))
    allocation: str | None = _flag(
        None, "what goes at once: the same ratio of every kind (default), or by saliency", choices=("uniform", "global")
    )
    shape_of: str | None = _flag(None, "run or model folder whose shape the result gets", "RUN")
    calibration_tokens: int = _flag(2**17, "tokens looked at before anything goes at once")
    distill: str | None = _flag(
        None, "learn from a frozen teacher too: folder or hub id (without a value: the source)", "TEACHER", bare=SOURCE
    )
    distill_weight: float = _flag(0.5, "share of the teacher in the loss, 0 to 1", "W")
    distill_temperature: float = _flag(1.0, "of both models' distributions where they are compared", "T")
    distill_hidden: float | None = _flag(None, "weight of the last hidden states' distance from the teacher's", "W")
    compensate: bool = _flag(False, "second-order update of the weights that stay")
    saliency: str = _flag(
        "taylor1",
        "taylor1: |w·g|; taylor2: with the diagonal Fisher's second-order term",
        choices=("taylor1", "taylor2"),
    )
    scored_layers: str = _flag(
        "output", "matrices that are scored: those that write to the residual stream, or all", choices=("output", "all")
    )
    layout: str = _flag("uniform", "per-layer: layers may end with different widths", choices=("uniform", "per-layer"))
    score_ema: float = _flag(0.0, "moving average of the saliency, 0 to below 1", "X")
    slot_steps: float | None = _flag(None, "pace: steps of a pruning slot")
    removals_per_step: float | None = _flag(None, "pace: removals a step", "K")
    round_to: int | None = _flag(
        None,
        "multiple that the result's sizes have (default: auto, what --for needs, else 1 below 10M parameters or 64)",
    )
    min_ffn: int | None = _flag(None, "smallest feed-forward width of a layer")
    min_hidden: int | None = _flag(None, "smallest hidden size")
    min_kv: int | None = _flag(None, "fewest key-value heads of a layer")
    save_at: tuple[int, ...] = _flag((), "size at which to save a model on the way (repeat)")
    engine: str | None = _flag(
        None, "how ranks under torchrun share the model (default: by its size)", choices=("ddp", "fsdp")
    )
    shards: int | None = _flag(None, "ranks that share one copy under fsdp (default: those of one machine)")
    precision: str | None = _flag(
        None, "of the products; weights stay float32 (default: bf16 on a GPU)", choices=("float32", "bf16")
    )
    compile: bool = _flag(False, "compile the layers (torch.compile), anew at every compaction")
    threads: int | None = _flag(None, "threads of a process on a CPU (default: its physical cores)")
    dtype: str | None = _flag(
        None, "dtype of the result's weights (default: the source's)", choices=("float32", "bf16", "fp16")
    )
    eval_every: int | None = _flag(None, "steps between validations")
    checkpoint_every: int | None = _flag(None, "steps between checkpoints")
    activation_checkpointing: str | None = _flag(
        None,
        "what the backward pass computes again, to save memory: nothing, all but products and attention (default on a "
        "CPU from 10M parameters), or whole layers (the flag without a value)",
        choices=CHECKPOINTING,
        bare="full",
    )
    log_to: str | None = _flag(None, "also log there", choices=("tensorboard", "wandb"))
    trust_remote_code: bool = _flag(False, "run the code that comes with the model")


FIELDS = {each.name: each for each in fields(RunConfig)}


def flag_name(name: str) -> str:
    """The flag of a field: `--batch-tokens` for `batch_tokens`; MODEL has none."""
    flag = {field: word for word, field in KEYWORDS.items()}.get(name, name)
    return "MODEL" if name == "model" else "--" + flag.replace("_", "-")


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that is spelled most like `name`."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0)[0]


def known_keys(mapping: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """The mapping with field names for keys, dashes made underscores.

    Raises:
        ConfigError: a key is no field, with the nearest one, or stands there twice.
    """
    named: dict[str, Any] = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        name = OLD_NAMES.get(name, KEYWORDS.get(name, name))
        if name not in FIELDS:
            raise ConfigError(f"{where}: unknown key '{key}'; did you mean {nearest(name, FIELDS)}?")
        if name in named:
            raise ConfigError(f"{where}: '{key}' is given twice, under two spellings; keep one")
        named[name] = value
    return named


def _scalar(name: str, kind: type, value: Any) -> Any:
    """`value` as a str, int, float or bool; a text is read the way a flag is."""
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{flag_name(name)}: '{value}' is not true or false")
        return value
    if isinstance(value, bool | list | tuple | dict):
        raise ConfigError(f"{flag_name(name)}: {value} is not a single {'text' if kind is str else 'number'}")
    if kind is int:
        return (parse_bytes if name == "target_bytes" else parse_count)(value, flag_name(name))
    if kind is str:
        return OLD_VALUES.get(name, {}).get(value, str(value))
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{flag_name(name)}: '{value}' is not a number; write 5e-4 or 0.0005") from None


def _value(name: str, value: Any) -> Any:
    kind: Any = FIELDS[name].type
    bare = FIELDS[name].metadata["bare"]
    if bare and isinstance(value, bool):  # in YAML: the flag without a value, or no flag
        value = bare if value else None
    if value is None or (value == "auto" and name in AUTO):
        return FIELDS[name].default
    if isinstance(kind, UnionType):
        kind = get_args(kind)[0]
    if kind in (str, int, float, bool):
        return _scalar(name, kind, value)
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(_scalar(name, get_args(kind)[0], item) for item in items)


def from_dict(mapping: Mapping[str, Any], where: str = "config") -> RunConfig:
    """The config of a mapping: names with dashes or underscores, counts also as '134M'; null is the default.

    Raises:
        ConfigError: an unknown key, or a value that is not of the field's kind.
    """
    return RunConfig(**{name: _value(name, value) for name, value in known_keys(mapping, where).items()})


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Every field with its value as JSON and YAML know it: lists for tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def dump_yaml(config: RunConfig) -> str:
    """The config as YAML, every field in the order of RunConfig."""
    import yaml

    return str(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The fields that a YAML file sets, values as they stand there.

    Raises:
        ConfigError: no such file, not YAML, no mapping, or an unknown key.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not YAML ({' '.join(str(error).split())}); mend it") from None
    if not isinstance(content or {}, dict):
        raise ConfigError(f"--config {path}: holds a {type(content).__name__}; write one 'flag: value' a line")
    return known_keys(content or {}, f"--config {path}")


def load_yaml(path: str | Path) -> RunConfig:
    """The config that a YAML file holds.

    Raises:
        ConfigError: as `read_yaml` and `from_dict`.
    """
    return from_dict(read_yaml(path), f"--config {path}")
