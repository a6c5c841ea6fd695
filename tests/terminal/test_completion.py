"""`completion`: shells that read the script complete verbs, flags and values; each is asked in a process of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from efficientllm.cli import HANDLERS, main
from efficientllm.config.run_config import FIELDS, flag_name
from efficientllm.flags import build_parser

BASH = r"""
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
complete_with=$(complete -p efficientllm | sed -E 's/.*-F ([^ ]+).*/\1/')
$complete_with efficientllm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""
LINES = [
    ("efficientllm pr", {"prune", "prepare"}, {"plan"}),
    ("efficientllm prune --target-", {"--target-params", "--target-bytes"}, {"--tokens"}),
    ("efficientllm prune --engine ", {"ddp", "fsdp"}, {"bf16"}),
    ("efficientllm prune --method one", {"one-shot", "one-shot-obs"}, {"random"}),
    ("efficientllm export --type q4", {"q4_0", "q4_k_m"}, {"f32"}),
    ("efficientllm plan --gpu H1", {"H100"}, {"A10"}),
    ("efficientllm completion ", {"bash", "zsh", "fish"}, set()),
]


@pytest.fixture
def script(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", request.param]) == 0
    file = tmp_path / "script"
    file.write_text(capsys.readouterr().out)
    return file


def answers(command: list[str]) -> set[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return {line.partition("\t")[0].strip() for line in done.stdout.splitlines()}


@pytest.mark.parametrize("script", ["bash"], indirect=True)
@pytest.mark.parametrize(("line", "offered", "not_offered"), LINES)
def test_bash_completes(script: Path, line: str, offered: set[str], not_offered: set[str]) -> None:
    found = answers(["bash", "-c", BASH, "bash", str(script), *line.split(" ")])
    assert offered <= found
    assert not not_offered & found


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
@pytest.mark.parametrize("script", ["fish"], indirect=True)
@pytest.mark.parametrize(("line", "offered", "not_offered"), LINES)
def test_fish_completes(script: Path, line: str, offered: set[str], not_offered: set[str]) -> None:
    found = answers(["fish", "-N", "-c", f"source {script}; complete -C '{line}'"])
    assert offered <= found
    assert not not_offered & found


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
@pytest.mark.parametrize("script", ["zsh"], indirect=True)
@pytest.mark.parametrize(("line", "offered", "not_offered"), LINES)
def test_zsh_completes(script: Path, line: str, offered: set[str], not_offered: set[str]) -> None:
    """A zsh at a terminal of its own: the line is typed, its choices are listed, and the screen is read."""
    found = zsh_screen(script, line)
    assert all(each in found for each in offered), found
    assert not any(each in found.replace(line, "") for each in not_offered), found


def zsh_screen(script: Path, line: str) -> str:
    """What zsh writes from the line on until it is asked to print `done`; keys come when its line editor reads them."""
    program = f"""
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z 'stty columns 200; PROMPT=; autoload -Uz compinit; compinit -u -D; eval "$(<{script})"'
zpty -w z "bindkey '^T' list-choices; LISTMAX=1000; zle-line-init() {{ print rea''dy }}; zle -N zle-line-init"
until zpty -r z text && [[ $text == *ready* ]]; do :; done
zpty -w -n z $'{line}\\x14\\x15'
zpty -w z "print do''ne"
until zpty -r z text && [[ $text == *done* ]]; do print -rn -- $text; done
"""
    return subprocess.run(["zsh", "-f", "-c", program], capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.mark.parametrize("script", ["bash", "zsh", "fish"], indirect=True)
def test_every_verb_and_every_flag_of_a_run_is_there(script: Path) -> None:
    text = script.read_text()
    _, verbs = build_parser(HANDLERS)
    assert all(verb in text for verb in verbs)
    assert all(flag_name(name).removeprefix("--") in text for name in FIELDS if name != "model")


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_the_parser_is_built_in_a_tenth_of_a_second_without_torch() -> None:
    program = (
        "import sys, time; from efficientllm.cli import HANDLERS, build_parser; start = time.process_time()\n"
        "build_parser(HANDLERS); took = time.process_time() - start\n"
        "print(took < 0.1, sorted({'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout == "True []\n"
