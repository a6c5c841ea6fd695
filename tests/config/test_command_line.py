"""Commands that are printed work as typed in the shell that sees them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from efficientllm.config.command_line import program


@pytest.mark.parametrize("on_path", [True, False])
def test_the_program_is_called_as_it_can_be(on_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_path:
        (tmp_path / "efficientllm").write_text(f'#!/bin/sh\nexec {sys.executable} -m efficientllm "$@"\n')
        (tmp_path / "efficientllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert (program() == "efficientllm") == on_path
    done = subprocess.run(f"{program()} --version", shell=True, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.startswith("efficientllm ")


def test_a_python_below_the_folder_is_named_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "a folder/.venv/bin/python"))
    monkeypatch.chdir(tmp_path / "..")
    assert shlex.split(program()) == [f"{tmp_path.name}/a folder/.venv/bin/python", "-m", "efficientllm"]
