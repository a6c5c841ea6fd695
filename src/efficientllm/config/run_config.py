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
    """A field and its flag; `bare` is what the flag means without a value, if it may have none."""
    metadata = {"help": help, "metavar": "|".join(choices) or metavar, "choices": choices, "bare": bare}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One `prune` run. Counts are plain integers; None means: derived from the model or the machine."""

    model: str = _flag("", "folder or hub id of the source model", "MODEL")
    data: tuple[str, ...] = _flag((), "file, folder or hub data set, with =WEIGHT in a mixture (repeatable)", "DATA")
    target_params: int | None = _flag(None, "target number of parameters, such as 134M")
    target_bytes: int | None = _flag(None, "target size of the GGUF file, such as 120MB; needs --for", "SIZE")
    for_type: str | None = _flag(None, "GGUF type that the result will be exported to", choices=GGUF_TYPES)
    out: str = _flag("", "run folder to write", "RUN")
    prune_tokens: int | None = _flag(None, "pace: number of tokens in the pruning phase")
    tokens: int = _flag(0, "total tokens of the run, including the pruning phase")
    valid: str | None = _flag(None, "validation data (default: 0.5%% of the documents)", "DATA")
    valid_tokens: int = _flag(1_000_000, "maximum number of validation tokens")
    text_field: str = _flag("text", "field of each row that holds the text", "NAME")
    txt_split: str = _flag("file", "what counts as a document in a .txt file", choices=("line", "blank", "file"))
    document_separator: str | None = _flag(
        None,
        "special tokens around each document (default: bos if it exists, else eos)",
        choices=("bos", "eos", "both", "none"),
    )
    seq_len: int = _flag(2048, "tokens per row")
    batch_tokens: int = _flag(2**20, "tokens per optimizer step")
    micro_batch_size: int | None = _flag(None, "rows per forward pass (default: auto, as many as fit)")
    lr: float | None = _flag(None, "peak learning rate (default: depends on the source's size)", "X")
    seed: int = _flag(0, "seed of data order, initial weights and sampling")
    init: str = _flag("pretrained", "weights to start from", choices=("pretrained", "scratch"))
    method: str = _flag("efficientllm", "how the model is made smaller (docs/methods.md)", choices=tuple(METHODS))
    allocation: str | None = _flag(
        None,
        "what one-shot pruning removes: the same ratio of every kind (default), or by saliency",
        choices=("uniform", "global"),
    )
    shape_of: str | None = _flag(None, "run or model folder whose shape the result takes", "RUN")
    calibration_tokens: int = _flag(2**17, "calibration tokens, read before one-shot pruning")
    distill: str | None = _flag(
        None, "also learn from a frozen teacher: folder or hub id (without a value: the source)", "TEACHER", bare=SOURCE
    )
    distill_weight: float = _flag(0.5, "teacher's share of the loss, 0 to 1", "W")
    distill_temperature: float = _flag(1.0, "softmax temperature at which the two models are compared", "T")
    distill_hidden: float | None = _flag(
        None, "weight of the distance between the last hidden states and the teacher's", "W"
    )
    compensate: bool = _flag(False, "second-order update of the remaining weights")
    saliency: str = _flag(
        "taylor1",
        "taylor1: |w·g|; taylor2: with the diagonal Fisher's second-order term",
        choices=("taylor1", "taylor2"),
    )
    scored_layers: str = _flag(
        "output",
        "which matrices are scored: those that write to the residual stream, or all",
        choices=("output", "all"),
    )
    layout: str = _flag(
        "uniform", "per-layer: layers may end up with different widths", choices=("uniform", "per-layer")
    )
    score_ema: float = _flag(0.0, "moving average of the saliency, from 0 (off) to below 1", "X")
    slot_steps: float | None = _flag(None, "pace: steps per pruning slot")
    removals_per_step: float | None = _flag(None, "pace: removals per step", "K")
    round_to: int | None = _flag(
        None,
        "round the result's sizes to multiples of N (default: auto: what --for needs, else 1 below 10M parameters or "
        "64)",
    )
    min_ffn: int | None = _flag(None, "minimum feed-forward width of a layer")
    min_hidden: int | None = _flag(None, "minimum hidden size")
    min_kv: int | None = _flag(None, "minimum number of key-value heads of a layer")
    save_at: tuple[int, ...] = _flag((), "also save a model at this size on the way (repeatable)")
    engine: str | None = _flag(
        None, "how ranks under torchrun share the model (default: depends on its size)", choices=("ddp", "fsdp")
    )
    shards: int | None = _flag(
        None, "ranks that share one copy of the model under fsdp (default: all ranks of one machine)"
    )
    precision: str | None = _flag(
        None, "precision of matrix products; weights stay float32 (default: bf16 on a GPU)", choices=("float32", "bf16")
    )
    compile: bool = _flag(False, "compile the layers (torch.compile), again after every compaction")
    threads: int | None = _flag(None, "threads per process on a CPU (default: its physical cores)")
    dtype: str | None = _flag(
        None, "dtype of the result's weights (default: the source's)", choices=("float32", "bf16", "fp16")
    )
    eval_every: int | None = _flag(None, "steps between validations")
    checkpoint_every: int | None = _flag(None, "steps between checkpoints")
    activation_checkpointing: str | None = _flag(
        None,
        "what the backward pass recomputes to save memory: nothing, all but products and attention (default on a CPU "
        "from 10M parameters), or whole layers (the flag without a value)",
        choices=CHECKPOINTING,
        bare="full",
    )
    log_to: str | None = _flag(None, "also log to this service", choices=("tensorboard", "wandb"))
    trust_remote_code: bool = _flag(False, "run the Python code that comes with the model")


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
        ConfigError: a key is not a field (the nearest one is named), or is given twice.
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
        raise ConfigError(f"{flag_name(name)}: {value} is not a single {'string' if kind is str else 'number'}")
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
    """The fields that a YAML file sets, values as written there.

    Raises:
        ConfigError: no such file, not YAML, no mapping, or an unknown key.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid YAML ({' '.join(str(error).split())}); fix it") from None
    if not isinstance(content or {}, dict):
        raise ConfigError(f"--config {path}: holds a {type(content).__name__}; write one 'flag: value' per line")
    return known_keys(content or {}, f"--config {path}")


def load_yaml(path: str | Path) -> RunConfig:
    """The config that a YAML file holds.

    Raises:
        ConfigError: as `read_yaml` and `from_dict`.
    """
    return from_dict(read_yaml(path), f"--config {path}")
