"""The flags: those of RunConfig under their headings, and each verb's own; argparse with errors of one line."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from efficientllm import __version__
from efficientllm.config.run_config import FIELDS, GGUF_TYPES, OLD_NAMES, flag_name
from efficientllm.errors import ConfigError
from efficientllm.numbers import SUFFIXES

Handler = Callable[[argparse.Namespace], int]

LIMITS = ("round_to", "min_ffn", "min_hidden", "min_kv")
TEXT = ("text_field", "txt_split", "document_separator")
GROUPS: dict[str, tuple[str, ...]] = {  # headings of `prune --help`
    "size": ("target_params", "target_bytes", "for_type", *LIMITS, "save_at"),
    "pace (give one of the first three)": ("prune_tokens", "slot_steps", "removals_per_step", "tokens"),
    "data": ("data", "valid", "valid_tokens", *TEXT),
    "batch": ("seq_len", "batch_tokens", "micro_batch_size", "activation_checkpointing"),
    "what is removed": (
        "method",
        "allocation",
        "shape_of",
        "calibration_tokens",
        "saliency",
        "scored_layers",
        "score_ema",
        "compensate",
        "layout",
    ),
    "training": ("lr", "seed", "init"),
    "teacher": ("distill", "distill_weight", "distill_temperature", "distill_hidden"),
    "machine": ("engine", "shards", "precision", "compile", "threads"),
    "run folder": ("out", "dtype", "eval_every", "checkpoint_every", "log_to"),
    "model": ("trust_remote_code",),
}
CLUSTER = (  # what `plan` asks beside the run itself
    ("--gpus", "N", "number of GPUs (default: 1)"),
    ("--gpu", "NAME", "which GPU, such as H100, A100-80GB or RTX-4090"),
    ("--flops", "X", "dense bf16 matrix FLOP/s of each GPU, such as 989T"),
    ("--bandwidth", "X", "bytes/s that a GPU sends to another, such as 450G (data sheets give both directions)"),
    ("--gpu-memory", "X", "bytes of memory of each GPU, such as 80G"),
    ("--mfu", "X", "fraction of the FLOP/s that training reaches (default: 0.4, an assumption)"),
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

    @property
    def flags(self) -> list[str]:
        """Every flag, as it is written."""
        return list(self._option_string_actions)


def check_flags(parser: Parser, arguments: Iterable[str], verbs: Mapping[str, Parser]) -> None:
    """Raises ConfigError at the first flag that the parser does not have, with the verbs that do or the nearest one."""
    flags = parser.flags
    for argument in arguments:
        flag = argument.partition("=")[0]
        if argument == "--":
            return
        if not re.match(r"-[^\d.]", flag) or " " in flag or flag in flags:
            continue
        if parser is verbs.get("prune") and flag in [name for name, _, _ in CLUSTER]:
            raise ConfigError(f"{flag} is a flag of plan; prune uses the GPUs that torchrun gives it (docs/scaling.md)")
        if owners := [name for name, other in verbs.items() if flag in other.flags]:
            raise ConfigError(
                f"{flag} is a flag of {', '.join(owners)}, not of {parser.prog}; see {parser.prog} --help"
            )
        close = difflib.get_close_matches(flag, flags, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {parser.prog} --help"
        raise ConfigError(f"unknown flag {flag}; {hint}")


def build_parser(handlers: Mapping[str, Handler]) -> tuple[Parser, dict[str, Parser]]:
    """The whole command line, and the parser of every verb; `handlers` are what the verbs do, by name."""
    parser = Parser(
        prog="efficientllm", description="Makes a pretrained decoder language model smaller while it trains."
    )
    parser.add_argument("--version", action="version", version=f"efficientllm {__version__}")
    added = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    def add(name: str, usage: str, help: str) -> Parser:
        verb: Parser = added.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", usage=f"efficientllm {name} {usage}"
        )
        verb.set_defaults(handler=handlers[name])
        return verb

    inspect = add("inspect", "MODEL [flags]", "shows what can be removed from a model, from its config.json alone")
    _add_model(inspect, required=True)
    _add_fields(inspect, (*LIMITS, "trust_remote_code"))

    plan = add(
        "plan",
        "MODEL --target-params N [flags]",
        "shows the shapes, steps, FLOPs, hours and memory of a run before it starts",
    )
    _add_model(plan)
    _add_groups(plan)  # all of them: `prune` in a command becomes `plan`, and it says what would happen
    _add_config(plan)
    plan.add_argument("--like", metavar="RUN", help="remove in the order of this run's log")
    cluster = plan.add_argument_group("GPUs to estimate for (plan only: hours, and memory of each GPU)")
    for flag, metavar, help in CLUSTER:
        cluster.add_argument(flag, metavar=metavar, help=help)

    prepare = add("prepare", "DATA... --tokenizer MODEL --out DIR [flags]", "turns text into token shards on disk")
    prepare.add_argument("data", metavar="DATA", nargs="+", help="file, folder or hub data set")
    prepare.add_argument(
        "--tokenizer", metavar="MODEL", required=True, help="folder or hub id of the model whose tokenizer to use"
    )
    prepare.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    _add_fields(prepare, (*TEXT, "trust_remote_code"))

    prune = add(
        "prune",
        "MODEL --data DATA --target-params N --prune-tokens N --tokens N --out RUN [flags]",
        "makes a model smaller while it trains",
    )
    _add_model(prune)
    _add_groups(prune)
    _add_config(prune)
    prune.add_argument("--resume", action="store_true", help="continue the run in --out")
    prune.add_argument(
        "--live",
        metavar="PORT",
        nargs="?",
        const="0",
        help="show the progress of the run on a web page, on this machine only (default: any free port)",
    )

    report = add("report", "RUN... [--out FILE]", "shows runs on one HTML page that needs no network")
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folder, finished or not")
    report.add_argument("--out", metavar="FILE", help="file to write (default: RUN/report.html)")
    report.add_argument(
        "--no-samples", action="store_true", help="do not load models to generate text before and after"
    )
    _add_fields(report, ("trust_remote_code",))

    generate = add("generate", 'MODEL "prompt" [flags]', "continues a prompt")
    _add_model(generate, required=True)
    generate.add_argument("prompt", metavar="PROMPT", help="text to continue")
    generate.add_argument(
        "--max-new-tokens", metavar="N", default="128", help="maximum number of tokens to generate (default: 128)"
    )
    generate.add_argument(
        "--temperature", metavar="X", default="0.8", help="sampling temperature; 0 is greedy (default: 0.8)"
    )
    _add_fields(generate, ("seed", "trust_remote_code"))

    export = add(
        "export",
        "MODEL --to gguf|onnx|hf --out FILE [flags]",
        "exports a model for a device, and checks the result there",
    )
    export.add_argument("model", metavar="MODEL", help="run folder, model folder or hub id")
    export.add_argument("--to", metavar="gguf|onnx|hf", required=True, help="format")
    export.add_argument("--out", metavar="FILE", required=True, help="file to write (for onnx and hf a folder)")
    export.add_argument("--type", metavar="TYPE", help=f"for gguf: {' '.join(GGUF_TYPES)}")
    export.add_argument("--dtype", metavar=FIELDS["dtype"].metadata["metavar"], help="for hf: dtype of the weights")
    export.add_argument("--shard-size", metavar="SIZE", help="for hf: maximum size of a weights file, such as 2GB")
    export.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    _add_fields(export, ("trust_remote_code",))

    bench = add("bench", "MODEL... [flags]", "compares the speed, memory and size of models on this machine")
    bench.add_argument("models", metavar="MODEL", nargs="+", help="run, model or ONNX folder, .gguf file, or hub id")
    bench.add_argument("--runtime", metavar="torch|llama.cpp|onnx", help="accept only models for this runtime")
    bench.add_argument("--prompt", metavar="N", default="128", help="prompt tokens to read (default: 128)")
    bench.add_argument("--new", metavar="N", default="64", help="tokens to generate (default: 64)")
    bench.add_argument("--json", action="store_true", help="print the results as JSON")
    _add_fields(bench, ("trust_remote_code",))

    evaluate = add("eval", "MODEL... [--tasks NAMES] [--text FILE] [flags]", "scores models on tasks and on text")
    evaluate.add_argument("models", metavar="MODEL", nargs="+", help="run folder, model folder or hub id")
    evaluate.add_argument(
        "--tasks",
        metavar="NAMES",
        help="comma-separated tasks; commonsense is the paper's eight (default without --text)",
    )
    evaluate.add_argument(
        "--data-dir", metavar="DIR", help="folder with local files of the tasks (default: the hub's data sets)"
    )
    evaluate.add_argument(
        "--text",
        metavar="FILE",
        action="append",
        default=[],
        help="text to compute perplexity and bits per byte on (repeatable)",
    )
    evaluate.add_argument(
        "--limit", metavar="N", help="score only the first N items of each task and documents of each text"
    )
    evaluate.add_argument("--batch-size", metavar="N", default="16", help="rows per forward pass (default: 16)")
    evaluate.add_argument(
        "--out", dest="results", metavar="JSON", help="file to write all results to, with errors, versions and hardware"
    )
    evaluate.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    _add_fields(evaluate, ("text_field", "txt_split", "trust_remote_code"))

    compare = add("compare", "RUN... [--out FILE] [--overwrite]", "shows runs side by side, from their folders")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="run folder, finished or not")
    compare.add_argument("--out", metavar="FILE", help="file to write: the table as .md, or everything as .json")
    compare.add_argument("--overwrite", action="store_true", help="replace --out if it exists")

    doctor = add("doctor", "[--json]", "shows whether a run would work here, and what this machine has")
    doctor.add_argument("--json", action="store_true", help="print it for programs")

    completion = add("completion", "SHELL", "prints a script that completes verbs, flags and values in a shell")
    completion.add_argument("shell", metavar="bash|zsh|fish", help="which shell")

    push = add("push", "RUN HUB/NAME [--private]", "uploads the model of a finished run to the Hugging Face hub")
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
        elif metadata["bare"] is not None:
            action |= {"nargs": "?", "const": metadata["bare"]}
        action |= {"dest": name, "default": argparse.SUPPRESS}
        parser.add_argument(flag_name(name), help=metadata["help"] + _default(name), **action)
        for old in (old for old, now in OLD_NAMES.items() if now == name):
            parser.add_argument(flag_name(old), help=argparse.SUPPRESS, **action)


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
    parser.add_argument(
        "--config", metavar="YAML", help="YAML file with values for any of these flags; flags take precedence"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resulting configuration and exit")
    parser.add_argument("--print_config", action="store_true", help=argparse.SUPPRESS)  # as it was spelled
