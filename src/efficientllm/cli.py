"""The verbs. Flags come from RunConfig; torch, transformers and datasets are imported by the verb that needs them."""

import argparse
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from efficientllm import __version__
from efficientllm.errors import ConfigError, EfficientLLMError
from efficientllm.numbers import SUFFIXES, parse_count
from efficientllm.training.cards import read_cluster
from efficientllm.training.config import (
    FIELDS,
    RunConfig,
    dump_yaml,
    flag_name,
    from_dict,
    nearest,
    read_yaml,
    validate,
)

LIMITS = ("round_to", "min_ffn", "min_hidden", "min_kv")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q4_k_m", "q5_k_m", "q6_k")
TEXT = ("text_field", "txt_split", "document_separator")
GROUPS: dict[str, tuple[str, ...]] = {  # headings of `prune --help`
    "size": ("target_params", *LIMITS, "save_at"),
    "pace (one of the first three)": ("prune_tokens", "slot_steps", "removals_per_step", "tokens"),
    "data": ("data", "valid", "valid_tokens", *TEXT),
    "batch": ("seq_len", "batch_tokens", "micro_batch_size", "activation_checkpointing"),
    "what is removed": ("saliency", "score", "score_ema", "compensate"),
    "training": ("lr", "seed", "init"),
    "machine": ("engine", "shards", "precision", "compile", "threads"),
    "run folder": ("out", "dtype", "eval_every", "checkpoint_every", "log_to"),
    "model": ("trust_remote_code",),
}
CLUSTER = (  # what `plan` asks beside the run itself
    ("--gpus", "N", "number of GPUs (default: 1)"),
    ("--gpu", "NAME", "which GPU, such as H100, A100-80GB or RTX-4090"),
    ("--flops", "X", "FLOP/s of dense bf16 matrix products of a GPU, such as 989T"),
    ("--bandwidth", "X", "bytes/s that a GPU sends to the next one, such as 450G: half of what data sheets add up"),
    ("--gpu-memory", "X", "bytes of memory of a GPU, such as 80G"),
    ("--mfu", "X", "part of the FLOP/s that training reaches (default: 0.4, an assumption)"),
)
MESSAGES = {  # argparse's words to ours
    r"^argument (-\S+): expected one argument$": r"\1: a value is missing",
    r"^argument (-\S+): ignored explicit argument (.*)$": r"\1 takes no value, found \2",
    r"^the following arguments are required: (.*)$": r"\1 is missing",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors, with the nearest flag for an unknown one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile(r"-[\d.]")  # -5M is a value that will be refused, not a flag

    def error(self, message: str) -> NoReturn:
        for pattern, found in MESSAGES.items():
            message = re.sub(pattern, found, message)
        raise ConfigError(f"{message}; see {self.prog} --help")

    def check_flags(self, arguments: Iterable[str]) -> None:
        """Raises ConfigError at the first flag that this verb does not have."""
        flags = self._option_string_actions
        for argument in arguments:
            flag = argument.partition("=")[0]
            if argument == "--":
                return
            if not re.match(r"-[^\d.]", flag) or " " in flag or flag in flags:
                continue
            raise ConfigError(f"unknown flag {flag}; did you mean {nearest(flag, flags)}?")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, 2 for a mistake that one line explains, 130 for Ctrl-C."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # libraries' notes to programmers
        warnings.showwarning = _show_warning
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        except (EfficientLLMError, OSError) as error:
            if os.environ.get("RANK", "0") == "0":  # under torchrun every rank fails alike
                print(f"efficientllm: error: {_one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        except SystemExit as leave:  # argparse has printed help or version
            return int(leave.code or 0)


def _run(arguments: list[str]) -> int:
    parser, verbs = build_parser()
    verb = arguments[0] if arguments else ""
    if verb in verbs:
        verbs[verb].check_flags(arguments[1:])
        # intermixed: argparse would take an optional MODEL behind a flag for one value too many
        given, left = verbs[verb].parse_known_intermixed_args(arguments[1:])
        if left:
            raise ConfigError(f"{verb}: '{left[0]}' is one value too many; for several values repeat the flag")
        handler: Callable[[argparse.Namespace], int] = given.handler
        return handler(given)
    if verb.startswith("-"):
        parser.check_flags(arguments[:1])
        parser.parse_args(arguments[:1])  # prints help or version, and leaves
    if verb:
        raise ConfigError(f"unknown verb '{verb}'; did you mean {nearest(verb, verbs)}?")
    raise ConfigError(f"a verb is missing; give one of {', '.join(verbs)}")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole command line, and the parser of every verb."""
    parser = Parser(
        prog="efficientllm", description="Makes a pretrained decoder language model smaller while it trains."
    )
    parser.add_argument("--version", action="version", version=f"efficientllm {__version__}")
    added = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=Parser)

    def add(name: str, handler: Callable[[argparse.Namespace], int], usage: str, help: str) -> Parser:
        verb: Parser = added.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", usage=f"efficientllm {name} {usage}"
        )
        verb.set_defaults(handler=handler)
        return verb

    inspect = add(
        "inspect", _inspect, "MODEL [flags]", "shows what can be removed from a model, from its config.json alone"
    )
    _add_model(inspect, required=True)
    _add_fields(inspect, (*LIMITS, "trust_remote_code"))

    plan = add(
        "plan",
        _plan,
        "MODEL --target-params N [flags]",
        "shows shapes, steps, FLOPs, hours and memory of a run before it starts",
    )
    _add_model(plan)
    _add_groups(plan)  # all of them: `prune` in a command becomes `plan`, and it says what would happen
    _add_config(plan)
    plan.add_argument("--like", metavar="RUN", help="take the order of removals from this run's log")
    cluster = plan.add_argument_group("on which GPUs (plan alone: hours, and memory of each)")
    for flag, metavar, help in CLUSTER:
        cluster.add_argument(flag, metavar=metavar, help=help)

    prepare = add(
        "prepare", _prepare, "DATA... --tokenizer MODEL --out DIR [flags]", "turns text into token shards on disk"
    )
    prepare.add_argument("data", metavar="DATA", nargs="+", help="file, folder or hub data set")
    prepare.add_argument(
        "--tokenizer", metavar="MODEL", required=True, help="folder or hub id of the model that will read it"
    )
    prepare.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    _add_fields(prepare, (*TEXT, "trust_remote_code"))

    prune = add(
        "prune",
        _prune,
        "MODEL --data DATA --target-params N --prune-tokens N --tokens N --out RUN [flags]",
        "makes a model smaller while it trains",
    )
    _add_model(prune)
    _add_groups(prune)
    _add_config(prune)
    prune.add_argument("--resume", action="store_true", help="go on with the run in --out")

    generate = add("generate", _generate, 'MODEL "prompt" [flags]', "continues a prompt")
    _add_model(generate, required=True)
    generate.add_argument("prompt", metavar="PROMPT", help="text to continue")
    generate.add_argument("--max-new-tokens", metavar="N", default="128", help="tokens to add at most (default: 128)")
    generate.add_argument(
        "--temperature", metavar="X", default="0.8", help="0 takes the likeliest token (default: 0.8)"
    )
    _add_fields(generate, ("seed", "trust_remote_code"))

    export = add(
        "export",
        _export,
        "MODEL --to gguf|onnx|hf --out FILE [flags]",
        "writes a model for a device, and proves it there",
    )
    export.add_argument("model", metavar="MODEL", help="run folder, model folder or hub id")
    export.add_argument("--to", metavar="gguf|onnx|hf", required=True, help="format")
    export.add_argument("--out", metavar="FILE", required=True, help="file to write; a folder for onnx and hf")
    export.add_argument("--type", metavar="TYPE", help=f"of gguf: {' '.join(GGUF_TYPES)}")
    export.add_argument("--dtype", metavar=FIELDS["dtype"].metadata["metavar"], help="of hf: the weights' dtype")
    export.add_argument("--shard-size", metavar="SIZE", help="of hf: largest file of weights, such as 2GB")
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    _add_fields(export, ("trust_remote_code",))

    bench = add("bench", _bench, "MODEL... [flags]", "compares models' speed, memory and size on this machine")
    bench.add_argument("models", metavar="MODEL", nargs="+", help="run, model or ONNX folder, .gguf file, or hub id")
    bench.add_argument("--runtime", metavar="torch|llama.cpp|onnx", help="refuse models that are for another")
    bench.add_argument("--prompt", metavar="N", default="128", help="tokens to read (default: 128)")
    bench.add_argument("--new", metavar="N", default="64", help="tokens to generate (default: 64)")
    bench.add_argument("--json", action="store_true", help="print numbers for programs")
    _add_fields(bench, ("trust_remote_code",))

    push = add("push", _push, "RUN HUB/NAME [--private]", "uploads the model of a finished run to the Hugging Face hub")
    push.add_argument("run", metavar="RUN", help="run folder, or a model folder")
    push.add_argument("repo", metavar="HUB/NAME", help="repository to upload to")
    push.add_argument("--private", action="store_true", help="make the repository private")
    return parser, added.choices


def _add_model(parser: Parser, required: bool = False) -> None:
    absent: dict[str, Any] = {} if required else {"nargs": "?", "default": argparse.SUPPRESS}
    parser.add_argument("model", metavar="MODEL", help="folder or hub id", **absent)


def _add_groups(parser: Parser) -> None:
    """The flags of RunConfig under their headings."""
    for title, names in GROUPS.items():
        _add_fields(parser.add_argument_group(title), names)


def _add_fields(parser: argparse._ActionsContainer, names: Iterable[str]) -> None:
    """One flag a field of RunConfig. What is not given stays out of the namespace, so that the file's value stands."""
    for name in names:
        kind, metadata = FIELDS[name].type, FIELDS[name].metadata
        action: dict[str, Any] = {"metavar": metadata["metavar"]}
        if kind is bool:
            action = {"action": argparse.BooleanOptionalAction}
        elif str(kind).startswith("tuple"):
            action["action"] = "append"
        parser.add_argument(
            flag_name(name), default=argparse.SUPPRESS, help=metadata["help"] + _default(name), **action
        )


def _default(name: str) -> str:
    """The default as the help names it; what is derived or has to be given says so itself."""
    value = FIELDS[name].default
    if value in (None, (), "") or value is False or name == "tokens":
        return ""
    for suffix in ("Mi", "M"):
        if value and isinstance(value, int) and value % SUFFIXES[suffix] == 0:
            return f" (default: {value // SUFFIXES[suffix]}{suffix})"
    return f" (default: {value})"


def _add_config(parser: Parser) -> None:
    parser.add_argument("--config", metavar="YAML", help="file with values for any of these flags; flags win")
    parser.add_argument("--print_config", action="store_true", help="print what the flags and the file make, and leave")


def _config(given: argparse.Namespace) -> RunConfig:
    """Defaults, below a resumed run's own config, below the file, below the flags."""
    flags = {name: value for name, value in vars(given).items() if name in FIELDS}
    path = getattr(given, "config", None)
    below: dict[str, Any] = read_yaml(path) if path else {}
    stored = Path(flags.get("out", below.get("out", ""))).expanduser() / "config.yaml"
    if getattr(given, "resume", False) and stored.is_file():
        below = read_yaml(stored) | below
    return from_dict(below | flags)


def _checked(given: argparse.Namespace) -> RunConfig:
    """The config of a verb that does not need all of it."""
    config = _config(given)
    validate(config, complete=False)
    return config


def _inspect(given: argparse.Namespace) -> int:
    config = _checked(given)
    from efficientllm.report.space import print_space

    limits = {name: getattr(config, name) for name in LIMITS}
    return print_space(config.model, **limits, trust_remote_code=config.trust_remote_code)


def _plan(given: argparse.Namespace) -> int:
    config = _checked(given)
    cluster = read_cluster(given.gpus, given.gpu, given.flops, given.bandwidth, given.gpu_memory, given.mfu)
    if given.print_config:
        return _print(config)
    for name, value in (("MODEL", config.model), ("--target-params", config.target_params)):
        if not value:
            raise ConfigError(f"{name} is missing; plan needs a model and the size to end with")
    from efficientllm.report.plan import print_plan

    return print_plan(config, given.like, cluster)


def _prepare(given: argparse.Namespace) -> int:
    config = _checked(given)
    from efficientllm.training.prepare import prepare_command

    text = {name: getattr(config, name) for name in (*TEXT, "trust_remote_code")}
    return prepare_command(config.data, tokenizer=given.tokenizer, out=config.out, **text)


def _prune(given: argparse.Namespace) -> int:
    config = _config(given)
    if given.print_config:
        validate(config, complete=False)
        return _print(config)
    if given.resume and not config.out:
        raise ConfigError("--out is missing; name the run folder to go on with")
    validate(config, complete=not given.resume)
    from efficientllm.training.run import prune

    return prune(config, resume=given.resume)


def _generate(given: argparse.Namespace) -> int:
    config = _checked(given)
    max_new_tokens = parse_count(given.max_new_tokens, "--max-new-tokens")
    try:
        temperature = float(given.temperature)
    except ValueError:
        temperature = -1.0
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {given.max_new_tokens} is below 1; give a whole number from 1")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"--temperature {given.temperature} is no number from 0 up; 0 takes the likeliest token")
    from efficientllm.delivery.generate import generate_text

    return generate_text(
        config.model,
        given.prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
    )


def _export(given: argparse.Namespace) -> int:
    _check_choice("--to", given.to, ("gguf", "onnx", "hf"))
    _check_choice("--type", given.type, GGUF_TYPES)
    _check_choice("--dtype", given.dtype, FIELDS["dtype"].metadata["choices"])
    from efficientllm.delivery.export import export

    return export(
        given.model,
        given.to,
        given.out,
        type=given.type,
        dtype=given.dtype,
        shard_size=given.shard_size,
        overwrite=given.overwrite,
        trust_remote_code=getattr(given, "trust_remote_code", False),
    )


def _bench(given: argparse.Namespace) -> int:
    _check_choice("--runtime", given.runtime, ("torch", "llama.cpp", "onnx"))
    prompt, new = parse_count(given.prompt, "--prompt"), parse_count(given.new, "--new")
    if min(prompt, new) < 1:
        raise ConfigError(f"--prompt {prompt}, --new {new}: give whole numbers from 1")
    from efficientllm.delivery.bench import bench

    trust = getattr(given, "trust_remote_code", False)
    return bench(
        given.models, runtime=given.runtime, prompt=prompt, new=new, as_json=given.json, trust_remote_code=trust
    )


def _check_choice(flag: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"{flag} {value} is not known; did you mean {nearest(value, known)}?")


def _push(given: argparse.Namespace) -> int:
    from efficientllm.delivery.hub import push

    return push(given.run, given.repo, private=given.private)


def _print(config: RunConfig) -> int:
    print(dump_yaml(config), end="")
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"efficientllm: warning: {' '.join(str(message).split())}", file=sys.stderr)
