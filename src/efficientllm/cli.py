"""What the verbs do; torch, transformers and datasets are imported by the verb that needs them."""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from efficientllm.config.checks import check_shards, validate
from efficientllm.config.run_config import FIELDS, GGUF_TYPES, RunConfig, dump_yaml, from_dict, nearest, read_yaml
from efficientllm.distributed.rendezvous import is_main_rank
from efficientllm.errors import ConfigError, EfficientLLMError
from efficientllm.flags import LIMITS, TEXT, build_parser, check_flags
from efficientllm.numbers import parse_count
from efficientllm.planning.gpus import read_cluster

PATIENCE = 60.0  # seconds that a silent rank waits for the main rank's line, at most


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, 2 for a mistake that one line explains, 130 for Ctrl-C."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # libraries' notes to programmers
        warnings.showwarning = _show_warning
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        except (EfficientLLMError, OSError) as error:
            # under torchrun every rank fails alike, but for what only one of them has
            if is_main_rank() or getattr(error, "one_rank", False):
                print(f"efficientllm: error: {_one_line(error)}", file=sys.stderr)
            else:
                time.sleep(PATIENCE)  # torchrun ends all ranks when one does: the one that reports exits first
            return 2
        except KeyboardInterrupt:
            return 130
        except SystemExit as leave:  # argparse has printed help or version
            return int(leave.code or 0)


def _run(arguments: list[str]) -> int:
    parser, verbs = build_parser(HANDLERS)
    verb = arguments[0] if arguments else ""
    if verb in verbs:
        check_flags(verbs[verb], arguments[1:], verbs)
        # intermixed: argparse would take an optional MODEL behind a flag for one value too many
        given, left = verbs[verb].parse_known_intermixed_args(arguments[1:])
        if left:
            raise ConfigError(
                f"{verb}: '{left[0]}' is an unexpected argument; to give a flag several values, repeat the flag"
            )
        given.words = arguments
        handler: Callable[[argparse.Namespace], int] = given.handler
        return handler(given)
    if verb.startswith("-"):
        check_flags(parser, arguments[:1], verbs)
        parser.parse_args(arguments[:1])  # prints help or version, and leaves
    if verb:
        raise ConfigError(f"unknown command '{verb}'; did you mean {nearest(verb, verbs)}?")
    raise ConfigError(f"no command given; use one of {', '.join(verbs)}")


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
    from efficientllm.terminal.inspect import print_space

    limits = {name: getattr(config, name) for name in LIMITS}
    return print_space(config.model, **limits, trust_remote_code=config.trust_remote_code)


def _plan(given: argparse.Namespace) -> int:
    config = _checked(given)
    cluster = read_cluster(given.gpus, given.gpu, given.flops, given.bandwidth, given.gpu_memory, given.mfu)
    if given.print_config:
        return _print(config)
    check_shards(config)
    for name, value in (("MODEL", config.model), ("--target-params", config.target_params or config.target_bytes)):
        if not value:
            raise ConfigError(f"{name} is missing; plan needs a model and a target size")
    if config.method != "efficientllm":
        raise ConfigError(f"--method {config.method}: plan supports only the method efficientllm; remove --method")
    from efficientllm.terminal.plan import print_plan

    return print_plan(config, given.like, cluster)


def _prepare(given: argparse.Namespace) -> int:
    config = _checked(given)
    from efficientllm.data.prepare import prepare_command

    text = {name: getattr(config, name) for name in (*TEXT, "trust_remote_code")}
    return prepare_command(config.data, tokenizer=given.tokenizer, out=config.out, **text)


def _prune(given: argparse.Namespace) -> int:
    config = _config(given)
    if given.print_config:
        validate(config, complete=False)
        return _print(config)
    if given.resume and not config.out:
        raise ConfigError("--out is missing; name the run folder to resume")
    port = _port(given.live)
    validate(config, complete=not given.resume)
    from efficientllm.report.live import followed
    from efficientllm.report.page import report_finished
    from efficientllm.run.prune import prune

    with followed(config.out, port if is_main_rank() else None):
        code = prune(config, resume=given.resume)
    if code == 0 and is_main_rank():
        report_finished(config.out)
    return code


def _port(text: str | None) -> int | None:
    """The port of `--live`; 0 is any free one, None no page."""
    if text is None:
        return None
    if not text.isdecimal() or int(text) > 65535:
        raise ConfigError(f"--live {text}: not a port; give a number up to 65535, or --live=0 for any free port")
    return int(text)


def _report(given: argparse.Namespace) -> int:
    from efficientllm.report.page import report

    trust = getattr(given, "trust_remote_code", False)
    return report(given.runs, given.out, samples=not given.no_samples, trust_remote_code=trust)


def _generate(given: argparse.Namespace) -> int:
    config = _checked(given)
    max_new_tokens = parse_count(given.max_new_tokens, "--max-new-tokens")
    try:
        temperature = float(given.temperature)
    except ValueError:
        temperature = -1.0
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {given.max_new_tokens} is below 1; give a whole number of at least 1")
    if not 0 <= temperature < math.inf:
        raise ConfigError(
            f"--temperature {given.temperature} is not a number of at least 0; give 0 for greedy decoding"
        )
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
        raise ConfigError(f"--prompt {prompt}, --new {new}: both must be whole numbers of at least 1")
    from efficientllm.delivery.bench import bench

    trust = getattr(given, "trust_remote_code", False)
    return bench(
        given.models, runtime=given.runtime, prompt=prompt, new=new, as_json=given.json, trust_remote_code=trust
    )


def _eval(given: argparse.Namespace) -> int:
    config = _checked(given)
    from efficientllm.evaluation.tasks import find_tasks

    names = given.tasks if given.tasks is not None else "" if given.text else "commonsense"
    if given.data_dir is not None and not names:
        raise ConfigError(f"--data-dir {given.data_dir} is used only with tasks; add --tasks or remove --data-dir")
    limit = None if given.limit is None else _at_least_one(given.limit, "--limit")
    tasks, batch_size = find_tasks(names) if names else [], _at_least_one(given.batch_size, "--batch-size")
    from efficientllm.terminal.eval import eval_command

    return eval_command(
        given.models,
        tasks,
        given.text,
        data_dir=given.data_dir,
        limit=limit,
        batch_size=batch_size,
        out=given.results,
        overwrite=given.overwrite,
        reading={"text_field": config.text_field, "txt_split": config.txt_split},
        trust_remote_code=config.trust_remote_code,
        arguments=given.words,
    )


def _compare(given: argparse.Namespace) -> int:
    from efficientllm.terminal.compare import compare

    return compare(given.runs, out=given.out, overwrite=given.overwrite)


def _doctor(given: argparse.Namespace) -> int:
    from efficientllm.terminal.doctor import doctor

    return doctor(as_json=given.json)


def _completion(given: argparse.Namespace) -> int:
    _check_choice("SHELL", given.shell, ("bash", "zsh", "fish"))
    from efficientllm.terminal.completion import completion_script

    print(completion_script(*build_parser(HANDLERS), given.shell))
    return 0


def _at_least_one(text: str, flag: str) -> int:
    number = parse_count(text, flag)
    if number < 1:
        raise ConfigError(f"{flag} {text} is below 1; give a whole number of at least 1")
    return number


def _check_choice(flag: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"{flag} {value} is not one of {', '.join(known)}; did you mean {nearest(value, known)}?")


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


HANDLERS = {
    "inspect": _inspect,
    "plan": _plan,
    "prepare": _prepare,
    "prune": _prune,
    "report": _report,
    "generate": _generate,
    "export": _export,
    "bench": _bench,
    "eval": _eval,
    "compare": _compare,
    "push": _push,
    "doctor": _doctor,
    "completion": _completion,
}
