"""Models, configs and tokenizers from a local folder or the hub. Safetensors only; remote code only when asked."""

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientllm.errors import ConfigError, UnsupportedModelError
from efficientllm.numbers import counted
from efficientllm.space.families import REFUSED, check_family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from efficientllm.space import Space

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DECODERS = ("ForCausalLM", "LMHeadModel")  # how the classes of decoder language models end
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md"]
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, arm: as /proc/cpuinfo names them


def load_config(model: str, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The config of a decoder language model; loads no weights.

    Raises:
        UnsupportedModelError: not found, no model, quantised, an encoder, or of an unknown type.
    """
    return _read_config(find_model(model), model, trust_remote_code)


def check_prunable(model: str) -> None:
    """Refuses a decoder of a family that cannot be pruned by its config.json alone, before torch is imported.

    What else may be wrong with a model is left to `load_config`.

    Raises:
        UnsupportedModelError: as `check_family` and `find_model`; no config.json, or a broken one.
    """
    path = find_model(model)
    raw = _read_json(path / "config.json", path, model)
    kind, classes = raw.get("model_type"), raw.get("architectures") or []
    is_decoder = kind in REFUSED or any(str(name).endswith(DECODERS) for name in classes)
    if isinstance(kind, str) and is_decoder and not raw.get("quantization_config"):
        try:
            check_family(kind)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"model {model}: {error}") from None


def load_model(model: str, dtype: "torch.dtype | None" = None, trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model with its weights, on the CPU and in evaluation mode; one whose layers differ needs no remote code here.

    Without `dtype`: the checkpoint's own where the machine computes in it, otherwise float32 (see `native_dtype`).

    Raises:
        UnsupportedModelError: as `load_config`; weights only as pickle, truncated, missing or of another shape.
    """
    _quiet()
    path = find_model(model, weights=True)
    config = _read_config(path, model, trust_remote_code)
    _check_weights(path, model)
    try:
        loaded, info = _class_of(config).from_pretrained(
            path,
            dtype=dtype or native_dtype(config),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever its parts raise
        raise UnsupportedModelError(
            f"model {model}: cannot be built from its config ({_first_line(error)}); check config.json"
        ) from None
    missing = sorted(info["missing_keys"])
    mismatched = sorted(info["mismatched_keys"])
    if missing or mismatched:
        found = (
            f"'{mismatched[0][0]}' has shape {tuple(mismatched[0][1])}, config.json asks for {tuple(mismatched[0][2])}"
            if mismatched
            else f"'{missing[0]}' is missing"
        )
        count = len(missing) + len(mismatched)
        raise UnsupportedModelError(
            f"model {model}: weights do not fit config.json: {found} ({count} of them); get both from one source"
        )
    if info["unexpected_keys"]:
        unexpected = sorted(info["unexpected_keys"])
        warnings.warn(
            f"model {model}: ignored {counted(len(unexpected), 'weight')} that config.json does not ask for, "
            f"such as '{unexpected[0]}'",
            stacklevel=2,
        )
    return loaded


def build_model(config: "PretrainedConfig", dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """The model of a config, with new weights, on torch's default device; layers may have widths of their own."""
    builder = _class_of(config)
    build = getattr(builder, "from_config", None) or builder._from_config  # of the auto class, of a model's own
    built: PreTrainedModel = build(config, **({} if dtype is None else {"dtype": dtype}))
    return built


def empty_model(config: "PretrainedConfig", model: str) -> "PreTrainedModel":
    """The model of a config on the meta device: names and shapes of its parameters, no memory.

    Raises:
        UnsupportedModelError: transformers cannot build it.
    """
    import torch

    try:
        with torch.device("meta"):
            return build_model(config)
    except Exception as error:  # transformers raises whatever its parts raise
        raise UnsupportedModelError(
            f"model {model}: cannot be built from its config ({_first_line(error)}); check config.json"
        ) from None


def open_space(config: "PretrainedConfig", model: str, per_layer: bool | None = None) -> "Space":
    """The pruning space of a config, without weights; by default layer by layer where its layers differ in width.

    Raises:
        UnsupportedModelError: as `empty_model` and `find_space`.
    """
    from efficientllm.space import find_space

    return find_space(empty_model(config, model), config.is_heterogeneous if per_layer is None else per_layer)


def load_tokenizer(model: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer beside a model.

    Raises:
        UnsupportedModelError: not found, or no tokenizer there.
    """
    from transformers import AutoTokenizer

    _quiet()
    path = find_model(model)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parts raise
        raise UnsupportedModelError(
            f"model {model}: no usable tokenizer ({_first_line(error)}); put its tokenizer.json beside config.json"
        ) from None


def find_model(model: str, weights: bool = False) -> Path:
    """The local folder of a model. An existing path wins over a hub id; from the hub, weights come only if asked for.

    Raises:
        UnsupportedModelError: neither a folder nor a model that the hub gives.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UnsupportedModelError(f"model {model}: is a file; name the folder that holds config.json")
    if not model or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise UnsupportedModelError(f"model {model}: no such folder; name a model folder or a hub id")

    from huggingface_hub import snapshot_download

    _quiet()
    patterns = [*SMALL_FILES, "model*.safetensors"] if weights else SMALL_FILES
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's errors share no type
        raise UnsupportedModelError(
            f"model {model}: no such folder, and the hub returned no such model ({_first_line(error)}); "
            "check the name or the connection"
        ) from None


def finished_model(run: str, verb: str) -> str:
    """The model of a finished run, or what was named if that is a model folder, or no folder and so a hub id.

    Raises:
        ConfigError: a run that is not finished, or a folder that holds no model.
    """
    path = Path(run).expanduser()
    if not path.is_dir():
        return run
    for folder in (path / "model", path):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return str(folder)
    if (path / "config.yaml").is_file():
        raise ConfigError(f"{verb} {run}: the run is not finished (it has no model/); finish it with prune --resume")
    raise ConfigError(f"{verb} {run}: has neither model/ nor a config.json with safetensors; name a run folder")


def native_dtype(config: "PretrainedConfig") -> "torch.dtype":
    """The checkpoint's dtype, or float32 where this machine computes slowly or not at all in it.

    A 1024³ product in bf16 on a CPU without its instructions takes 100 times as long as in float32.
    """
    import torch

    stored = getattr(config, "dtype", None)
    if not isinstance(stored, torch.dtype):
        return torch.float32
    if stored in (torch.float16, torch.bfloat16) and not torch.cuda.is_available():
        return stored if stored == torch.bfloat16 and cpu_has_bf16() else torch.float32
    return stored


def cpu_has_bf16() -> bool:
    """Whether the processor's flags name bf16 instructions; False where the system does not tell."""
    try:
        return not BF16_INSTRUCTIONS.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def _class_of(config: "PretrainedConfig") -> Any:
    """What builds a config's model: transformers' auto class, or ours where layers have widths of their own."""
    from transformers import AutoModelForCausalLM

    from efficientllm.models.heterogeneous import model_class

    return (config.is_heterogeneous and model_class(config)) or AutoModelForCausalLM


def _read_config(path: Path, model: str, trust_remote_code: bool) -> "PretrainedConfig":
    from transformers import AutoConfig

    _quiet()
    raw = _read_json(path / "config.json", path, model)
    if "quantization_config" in raw:
        method = (raw["quantization_config"] or {}).get("quant_method", "unknown method")
        raise UnsupportedModelError(
            f"model {model}: quantised ({method}); prune the original, then quantise the result"
        )
    kind = raw.get("model_type")
    if not kind and "auto_map" not in raw:
        raise UnsupportedModelError(f"model {model}: config.json names no model_type; name a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parts raise
        hint = "" if trust_remote_code or "auto_map" not in raw else "; --trust-remote-code runs the model's own code"
        raise UnsupportedModelError(
            f"model {model}: config.json of model_type '{kind}' cannot be read ({_first_line(error)}){hint}"
        ) from None
    _check_decoder(config, model, remote=trust_remote_code and "AutoModelForCausalLM" in raw.get("auto_map", {}))
    return config


def _check_decoder(config: "PretrainedConfig", model: str, remote: bool) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        found = "an encoder-decoder"
    elif remote:
        return
    else:
        # encoders such as BERT are in the mapping too, as a class that their checkpoints do not name
        decoder = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        architectures = [name.removeprefix("PerLayer") for name in config.architectures or []]  # as we save them
        if decoder and (decoder in architectures if architectures else getattr(config, "is_decoder", True)):
            return
        found = f"{architectures[0]} is" if architectures else "it is"
        found += " not a decoder language model"
    raise UnsupportedModelError(
        f"model {model}: model_type '{config.model_type}': {found}; use a decoder (…ForCausalLM)"
    )


def _check_weights(path: Path, model: str) -> None:
    """Opens every shard: a header that does not cover its file is what a cut-off download leaves."""
    from safetensors import SafetensorError, safe_open

    if (path / WEIGHTS).is_file():
        shards = [path / WEIGHTS]
    elif (path / INDEX).is_file():
        names = _read_json(path / INDEX, path, model).get("weight_map", {}).values()
        shards = [path / name for name in sorted(set(names))]
    elif pickles := [file.name for pattern in PICKLES for file in path.glob(pattern)]:
        raise UnsupportedModelError(
            f"model {model}: its weights are a pickle ({pickles[0]}), which is never loaded; convert them to "
            "safetensors"
        )
    else:
        raise UnsupportedModelError(
            f"model {model}: no {WEIGHTS} in {path}; name a folder with safetensors weights (convert pickled ones)"
        )
    for shard in shards:
        try:
            with safe_open(shard, framework="pt"):
                pass
        except FileNotFoundError:
            raise UnsupportedModelError(f"model {model}: {shard.name} is missing; download it again") from None
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(
                f"model {model}: {shard.name} is truncated or corrupt ({_first_line(error)}); download it again"
            ) from None


def _read_json(file: Path, path: Path, model: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = path / "model"
        hint = f"did you mean {inside}?" if (inside / "config.json").exists() else "name a Hugging Face model folder"
        raise UnsupportedModelError(f"model {model}: not a model folder (it has no {file.name}); {hint}") from None
    except (ValueError, OSError) as error:
        raise UnsupportedModelError(
            f"model {model}: broken {file.name} ({_first_line(error)}); fix it or download it again"
        ) from None
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"model {model}: broken {file.name} (not a JSON object); download it again")
    return content


def _quiet() -> None:
    """Silences what the libraries print on the way; problems come as our errors, in one line."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
