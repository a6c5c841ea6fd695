"""Every command of README.md and docs/*.md runs here as it stands there, at a tiny size, or is listed with the reason.

Shell and Python blocks are read from the text, placeholders and sizes replaced by the tables below, and `efficientllm`
run in this process, in a folder where MODEL, DATA and RUN exist. Flags named anywhere in the text must exist.
"""

import difflib
import io
import json
import logging
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import pytest

from efficientllm.cli import HANDLERS, main
from efficientllm.errors import ConfigError
from efficientllm.flags import build_parser, check_flags
from helpers.paths import DEMO_MODEL, ROOT

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"(\w+=\S+ )*(efficientllm|torchrun|python|make|pip|sbatch|for|eval|llama-cli|ssh|git|docker)\s")
HAS_LLAMA_CPP = find_spec("llama_cpp") is not None

NAMES = {  # a placeholder in a command, and what stands for it
    "MODEL": str(DEMO_MODEL),
    "SMOLLM2": str(DEMO_MODEL),
    "stories260K": str(DEMO_MODEL),
    "shapes/odd": str(DEMO_MODEL),  # made by benchmarks/edge.py
    "TEACHER": str(DEMO_MODEL),
    "DATA…": "train.jsonl",
    "DATA": "train.jsonl",
    "FILE": "valid.jsonl",
    "book.txt": "valid.jsonl",
    "MORE": "3k",
    "W": "0.5",
    "N": "1",
    "8000": "0",  # any free port
} | ({} if HAS_LLAMA_CPP else {"q4_k_m": "q4_0"})
SIZES = {  # seconds on the demo's model; where the model is one of SHAPES the command's own stay
    "--target-params": "450k",
    "--target-bytes": "450kB",
    "--prune-tokens": "1k",
    "--tokens": "2k",
    "--seq-len": "64",
    "--batch-tokens": "256",
}
RUN = ["--data", "train.jsonl", "--target-params", "450k", "--prune-tokens", "1k", "--tokens", "2k", "--out", "out"]
SMALLER = {  # added to a verb, unless given
    "prune": ["--seq-len", "64", "--batch-tokens", "256"],
    "plan": ["--seq-len", "64", "--batch-tokens", "256"],
    "generate": ["--max-new-tokens", "4"],
    "bench": ["--prompt", "8", "--new", "4"],
    "eval": ["--limit", "2"],
}
SHAPES = {  # models that `plan` is asked about: their config.json is all it reads
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
NOT_RUN = {  # flags of efficientllm in them are checked all the same
    r"^make ": "a target that installs, or runs this suite; it exists in the Makefile",
    r"^pip install": "asks the package index; the extra exists in pyproject.toml",
    r"^torchrun ": "several processes: tests/distributed/",
    r"^sbatch ": "needs Slurm",
    r"^llama-cli ": "llama.cpp's own program",
    r"^python (benchmarks|experiments)/": "minutes to hours, on material outside the repository; the file exists",
    r"--tasks ": "asks the hub for data sets: tests/evaluation/ runs the tasks on local files",
    r"--compile": "compiles for a minute: tests/training/test_recompute.py and tests/distributed/",
}
SLOW = re.compile(
    r"^efficientllm (bench|doctor)|--to onnx|llama2-70b"
)  # a process for each model, or seconds of arithmetic
LONG = (
    "docs/tutorial.md",
    "docs/edge.md",
    "docs/distillation.md",
)  # pages whose commands are all left to the slow tests
PYTHON = {  # the same for blocks of Python
    "134_000_000": "450_000",
    "steps=8000, warmup_steps=500": "steps=2, warmup_steps=1",
}
OTHERS = {  # flags of other programs that the text names
    *("--nproc-per-node", "--nnodes", "--max-restarts", "--shutdown-timeout", "--signal"),
    *("--rdzv-endpoint", "--rdzv-id", "--rdzv-backend", "--fail-on-warning"),
}


# Reading


def blocks(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """The first line's number, the language, and the lines of every fenced or indented block; paragraphs apart."""
    lines = [*text.splitlines(), ""]
    number = 0
    while number < len(lines):
        line = lines[number]
        if fence := re.match(r"(```+)(\S*)", line):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].startswith(fence[1]))
            yield number + 2, fence[2], lines[number + 1 : end]
            number = end
        elif line.startswith("    ") and line.strip() and not lines[number - 1].strip():
            end = next(n for n in range(number, len(lines)) if not lines[n].startswith("    "))
            yield number + 1, "", [each[4:] for each in lines[number:end]]
            number = end - 1
        number += 1


def commands(lines: Sequence[str], shell: bool = False) -> list[str]:
    """The commands of a block, without `$` and comments: all its lines, those behind a `$`, or none (output).

    Raises:
        ValueError: a line among commands that is none that is known.
    """
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    prompted = [line[2:] for line in joined if line.startswith("$ ")]
    found = prompted or joined
    bare = [re.split(r"(?:^|\s)#\s", line)[0].strip() for line in found]
    bare = [line for line in bare if line]
    for line in bare if prompted or shell or (bare and PROGRAM.match(bare[0] + " ")) else bare[:1]:
        first = line.split()[0]
        near = first[-1] != ":" and difflib.SequenceMatcher(None, first, "efficientllm").ratio() > 0.8
        if not PROGRAM.match(line + " ") and (prompted or shell or near or PROGRAM.match(bare[0] + " ")):
            raise ValueError(f"'{line}' stands among commands and is none that tests/test_docs.py knows")
    return [part for line in bare if PROGRAM.match(line + " ") for part in split(line)]


def split(line: str) -> list[str]:
    """A line's commands: the parts between semicolons, a loop's body once for its first value, what `eval` asks."""
    line = re.sub(r"^(\w+=\S+ )+|\s>\s*\S+$", "", line)
    line = re.sub(r'^eval "\$\((.*)\)"$', r"\1", line)
    if loop := re.match(r"for (\w+) in (\S+)[^;]*; do (.*); done$", line):
        line = loop[3].replace(f"${loop[1]}", loop[2])
    return [part.strip() for part in line.split(";")] if "python -c" not in line else [line]


def tiny(command: str) -> list[str]:
    """The words of an `efficientllm` command with the tables' values, the verb first."""
    words = shlex.split(command.replace("[", "").replace("]", ""))[1:]
    verb, rest = words[0], [NAMES.get(word, word.split("|")[0]) for word in words[1:]]
    if rest[-2:] == ["--out", "…"]:
        rest[-1] = "out"
    if verb in ("prune", "plan") and (not rest or rest[0] not in SHAPES):
        for flag, size in SIZES.items():
            rest = [size if before == flag else word for before, word in zip(["", *rest], rest, strict=False)]
    if verb in ("prune", "plan") and "--resume" not in rest:
        if not rest or rest[0].startswith("-") or rest[0] == "…":
            rest.insert(0, str(DEMO_MODEL))
        if "…" in rest or verb == "prune":
            rest = [word for word in rest if word != "…"]
            given = {*rest} | ({"--target-params"} if "--target-bytes" in rest else set())
            rest += [word for pair in zip(RUN[::2], RUN[1::2], strict=True) if pair[0] not in given for word in pair]
    if verb == "bench" and not HAS_LLAMA_CPP:
        rest = [word for word in rest if not word.endswith(".gguf")] or [str(DEMO_MODEL)]
    more = SMALLER.get(verb, []) if rest and "--resume" not in rest and rest[0] not in SHAPES else []
    return [verb, *rest, *(w for p in zip(more[::2], more[1::2], strict=True) if p[0] not in rest for w in p)]


# Running


def failures(page: str, text: str, done: dict[str, int], slow: bool = False) -> list[str]:
    """What does not work of a page's text, one line a command, in the folder that is the present one."""
    found = []
    for number, language, lines in blocks(text):
        if language.startswith("{") or language in ("text", "yaml", "toml", "json", "css", "bibtex", "mermaid"):
            continue
        where = f"{page}:{number}"
        try:
            if language == "python":
                found += [f"{where}: {problem}" for problem in run_python("\n".join(lines))]
                continue
            for command in commands(lines, shell=language in ("sh", "bash", "console", "shell")):
                if slow or not SLOW.search(command):
                    found += [f"{where}: {command}: {problem}" for problem in run(command, done)]
        except ValueError as error:
            found.append(f"{where}: {error}")
    return found


def run(command: str, done: dict[str, int]) -> list[str]:
    """Runs a command, or checks as much of it as there is to check without running it. Returns what is wrong."""
    reason = next((pattern for pattern in NOT_RUN if re.search(pattern, command)), None)
    if reason is not None:
        done[reason] = 0
        return missing_in(command)
    if command.startswith("python -c "):
        exec(shlex.split(command)[2], {})
        return []
    if not command.startswith("efficientllm "):
        return ["neither run nor listed in NOT_RUN"]
    words = tiny(command)
    key = shlex.join(words)
    if key not in done:
        out = Path(words[words.index("--out") + 1]) if "--out" in words else None
        if out and "--resume" not in words and out.exists():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        said = io.StringIO()
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            done[key] = main(words)
        if done[key]:
            return [f"as '{key}': exit code {done[key]}, {said.getvalue().strip().splitlines()[-1:]}"]
    return []


def missing_in(command: str) -> list[str]:
    """What a command that is not run names and is not there: a flag, a file, a make target, an extra."""
    if command.startswith("make "):
        targets = re.findall(r"(?m)^(\w[\w-]*):", (ROOT / "Makefile").read_text())
        return [f"the Makefile has no {word}" for word in command.split()[1:2] if word not in targets]
    if command.startswith("pip "):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [each for group in re.findall(r"\[([\w,]+)\]", command) for each in group.split(",")]
        return [f"pyproject.toml has no extra {each}" for each in named if each not in extras]
    if script := re.match(r"(?:python|sbatch) .*?([\w/]+\.(?:py|sbatch))\b", command):
        return [] if (ROOT / script[1]).exists() else [f"no file {script[1]}"]
    return unknown_flags(command)


def unknown_flags(command: str) -> list[str]:
    """The complaint about a flag that the command's verb does not have."""
    found = re.match(r"(?:.*?\s)?efficientllm (\S+)(.*)", command)
    if not found:
        return []
    verb, rest = found[1], re.split(r"[\s\[\]=]+", found[2])
    verbs = build_parser(HANDLERS)[1]
    if verb not in verbs:
        return [] if verb.startswith("-") or not verb.isalpha() else [f"no verb {verb}"]
    try:
        check_flags(verbs[verb], [word for word in rest if word.startswith("--")], verbs)
    except ConfigError as error:
        return [str(error)]
    return []


def run_python(code: str) -> list[str]:
    """Runs a block of Python with a model, batches and torch at hand, as a loop of one's own has them."""
    import torch
    from transformers import AutoModelForCausalLM

    for text, instead in PYTHON.items():
        code = code.replace(text, instead)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    rows = torch.randint(0, 2000, (3, 2, 32), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": each, "labels": each} for each in rows]
    try:
        exec(code, {"model": model, "batches": batches, "torch": torch})
    except Exception as error:  # whatever it is, the block does not work
        return [f"Python block: {type(error).__name__}: {error}"]
    return []


# The tests


@pytest.fixture(scope="module")
def done() -> dict[str, int]:
    """Exit codes of what has been run, by its words: a command that two pages have runs once."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keeps what torch logs of every tensor of a checkpoint out of a failure's report."""
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what commands name: text, tokens, finished runs, models to plan for."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "src").symlink_to(ROOT / "src")
    (folder / "text").mkdir()
    for name, count in (("train.jsonl", 400), ("valid.jsonl", 8)):
        text = [
            json.dumps({"text": f"Return the {name} of number {n}, {'very ' * (n % 7)}much."}) for n in range(count)
        ]
        (folder / name).write_text("\n".join(text) + "\n")
        (folder / "text" / name).write_text("\n".join(text) + "\n")
    for name, sizes in SHAPES.items():
        (folder / name).mkdir()
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, **sizes}
        (folder / name / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        assert main(["prepare", "train.jsonl", "--tokenizer", str(DEMO_MODEL), "--out", "TOKENS"]) == 0
        assert main(tiny("efficientllm prune MODEL --data TOKENS … --out RUN")) == 0
    for name in ("RUN_A", "RUN_B", "small"):
        shutil.copytree(folder / "RUN", folder / name)
    return folder


@pytest.mark.parametrize(
    ("page", "slow"),
    [
        *((page, False) for page in PAGES if page not in LONG),
        *(pytest.param(page, True, marks=pytest.mark.slow) for page in PAGES),
    ],
)
def test_commands_run(
    page: str, slow: bool, folder: Path, done: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert not (wrong := failures(page, (ROOT / page).read_text(), done, slow)), "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page: str) -> None:
    text = re.sub(r"(?ms)^```.*?^```", "", (ROOT / page).read_text())
    known = {flag for verb in build_parser(HANDLERS)[1].values() for flag in verb.flags} | OTHERS
    wrong = []
    for span in re.findall(r"`([^`\n]+)`", text):
        wrong += unknown_flags(span)
        first = re.match(r"--[a-z][\w-]*(?![\w-]|[…*])", span)  # `--min-*` is several
        wrong += [f"no verb has {first[0]}"] if first and first[0] not in known else []
    assert not wrong, wrong


def test_messages_in_troubleshooting_are_ours() -> None:
    """What "the line says" must be what a line of the program says, up to names and numbers."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    source = re.sub(r'"\n\s*f?"', "", source)  # a message over several lines
    lines = [line for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line[:2] in ("| ", "- ")]
    quoted = [quote for line in lines for quote in re.findall(r'"([^"]+)"', line.partition(" | ")[0])]
    said = [part.strip(" .,;()'") for quote in quoted for part in re.split(r"…|\d+|RUN|\(|'model\.", quote)]
    assert len(quoted) > 12
    assert not (missing := [part for part in said if len(part) > 3 and part not in source]), missing


def test_reasons_are_used() -> None:
    """A reason not to run something that no page has any more is to go."""
    pages = "\n".join((ROOT / page).read_text() for page in PAGES)
    found = [command for _, _, lines in blocks(pages) for command in lenient(lines)]
    unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, command) for command in found)]
    assert not unused, unused


def lenient(lines: list[str]) -> list[str]:
    try:
        return commands(lines)
    except ValueError:
        return []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("    efficientllm inspect MODEL --round-two 8", "--round-two"),
        ("    efficientllm report RUN --targt 3   # what it is for", "--targt"),
        ("    efficientllm prune MODEL … \\\n        --score-em 0.9", "--score-em"),
        ("    torchrun --nproc-per-node 8 -m efficientllm prune MODEL … --engin fsdp", "--engin"),
        ("    efficientllm eval RUN --tasks commonsense --dta x", "--dta"),
        ("    efficientllm inspect NOWHERE", "exit code 2"),
        ("    efficientlm inspect MODEL", "none that"),
        ("```sh\nrm -rf RUN\n```", "none that"),
        ("    $ efficientllm inspekt MODEL\n    4 layers", "inspekt"),
        ("    git clone somewhere", "neither run nor listed"),
        ("    make dmo", "no dmo"),
        ("    pip install 'efficientllm[evil]'", "no extra evil"),
        ("    python benchmarks/stepps.py", "no file benchmarks/stepps.py"),
        ("```python\nPrunner(model)\n```", "NameError"),
    ],
)
def test_what_does_not_work_is_found(
    text: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (problem,) = failures("page", f"Text.\n\n{text}\n\nMore.\n", {})
    assert words in problem
    assert not failures("page", "Text.\n\n    efficientllm inspect MODEL   # works\n\n    loss 3, --no-flag\n", {})


def test_a_command_is_made_tiny() -> None:
    command = "efficientllm prune MODEL --data DATA --target-params 134M … --out RUN [--engine ddp|fsdp]"
    words = tiny(command)
    assert words[:6] == ["prune", str(DEMO_MODEL), "--data", "train.jsonl", "--target-params", "450k"]
    assert words[words.index("--out") + 1] == "RUN" and words[words.index("--engine") + 1] == "ddp"
    assert words[words.index("--tokens") + 1] == "2k" and words.count("--data") == 1
    assert tiny("efficientllm plan llama2-7b --tokens 50B")[1:] == ["llama2-7b", "--tokens", "50B"]
