"""A function in a process of its own: runtimes that abort at surprises, and memory that is theirs alone."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import ParamSpec, TypeVar

from efficientllm.errors import EfficientLLMError

P = ParamSpec("P")
R = TypeVar("R")


def in_child(runtime: str, function: Callable[P, R], *args: P.args, **settings: P.kwargs) -> R:
    """Returns what a function of this package gives in a new process, whose stderr is kept from the terminal.

    Raises:
        EfficientLLMError: it failed, or its process died; with the name of the runtime and the last line it wrote.
    """
    with (
        NamedTemporaryFile("r", errors="replace") as log,
        ProcessPoolExecutor(1, get_context("spawn"), _redirect, (log.name,)) as pool,
    ):
        try:
            return pool.submit(function, *args, **settings).result()
        except (BrokenProcessPool, ValueError, RuntimeError) as error:
            words = [line.strip() for line in log.read().splitlines() if line.strip()] or [str(error)]
            raise EfficientLLMError(f"{runtime} failed: {words[-1]}") from None


def _redirect(log: str) -> None:
    os.environ["GGML_NO_BACKTRACE"] = "1"
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)


def peak_memory() -> int:
    """Returns the most bytes that this process had in memory at once.

    From /proc where there is one: getrusage counts what the parent had when it started this process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
