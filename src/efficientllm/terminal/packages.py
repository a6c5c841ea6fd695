"""Which packages are installed and work: child processes import them, so that a broken one breaks nothing here.

Also the child's program: a JSON line for each package as soon as it knows, so that a crash leaves the lines before.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]  # of a checkout
MODULES = {"pyyaml": "yaml"}  # where the name of the module is not that of the package
PROGRAM = "from efficientllm.terminal.packages import report_imports; report_imports()"
WITH_TORCH = {"torch", "transformers", "accelerate", "lm-eval", "tensorboard"}  # import it, or what imports it
TIMEOUT = 60  # seconds for one child; a cold disk reads torch in about ten


@dataclass(frozen=True)
class Package:
    """A package that is asked for, and what importing it gave.

    Attributes:
        name: as pip knows it.
        wanted: the versions that pyproject.toml asks for, such as '>=2.8'.
        tested: the version that the test suite is run with; None where that is not known.
        found: its version; None if it is not installed or cannot be imported.
        problem: what is wrong, in one line; None if it works.
        more: what the child says beside the version: torch's devices.
    """

    name: str
    wanted: str
    tested: str | None = None
    found: str | None = None
    problem: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


def read_claims() -> tuple[str, dict[str, list[Package]]]:
    """Returns the Python that is asked for, and the packages by extra ('' for what every run needs), nothing imported.

    From pyproject.toml and constraints.txt of a checkout, else from the installed package's metadata.
    """
    file = ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        python, needs = project["requires-python"], {"": project["dependencies"], **project["optional-dependencies"]}
    else:
        found = metadata.metadata("efficientllm")
        python, needs = found["Requires-Python"], {"": []}
        for line in metadata.requires("efficientllm") or []:
            need, _, condition = line.partition(";")
            extra = re.search(r"extra == ['\"](.+?)['\"]", condition)
            needs.setdefault(extra[1] if extra else "", []).append(need.strip())
    tested = _tested()
    packages = {}
    for extra, lines in needs.items():
        if extra != "dev":
            packages[extra] = [_package(line, tested) for line in lines]
    return python, packages


def _package(line: str, tested: dict[str, str]) -> Package:
    name, wanted = re.fullmatch(r"([\w.-]+)\s*(.*)", line).groups()  # type: ignore[union-attr]
    return Package(name, wanted, tested.get(_same(name)))


def _tested() -> dict[str, str]:
    for file in (ROOT / "constraints.txt", Path(__file__).parents[1] / "constraints.txt"):  # a checkout, a wheel
        if file.is_file():
            pairs = re.findall(r"^([\w.-]+)==(\S+)", file.read_text(), re.MULTILINE)
            return {_same(name): version for name, version in pairs}
    return {}


def _same(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def is_allowed(version: str, wanted: str) -> bool:
    """Returns whether a version is among those asked for; only `>=` and `<` are used here."""
    for sign, bound in re.findall(r"(>=|<)\s*([\d.]+)", wanted):
        if (_numbers(version) >= _numbers(bound)) != (sign == ">="):
            return False
    return True


def _numbers(version: str) -> list[int]:
    """The release of a version as numbers: 2.13.0+cpu and 2.13rc1 are both 2.13."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def try_packages(packages: Sequence[Package]) -> dict[str, Package]:
    """Returns the packages by name with what importing them gave. Two children share them; one of them loads torch."""
    with_torch = [package for package in packages if package.name in WITH_TORCH]
    without = [package for package in packages if package.name not in WITH_TORCH]
    with ThreadPoolExecutor(2) as pool:
        return {package.name: package for done in pool.map(_try_group, (with_torch, without)) for package in done}


def _try_group(packages: Sequence[Package]) -> list[Package]:
    """Imports them in one child; if it dies, what it died of is marked, and another child takes the rest."""
    left, done = list(packages), []
    while left:
        answers, why = _ask([package.name for package in left])
        for package, answer in zip(left, answers, strict=False):
            done.append(_judge(package, answer))
        left = left[len(answers) :]
        if left and why:
            done.append(_judge(left.pop(0), {"problem": why}))
    return done


def _ask(names: list[str]) -> tuple[list[dict[str, Any]], str | None]:
    """Returns what a child says of the packages, in order, and what ended it before the last of them."""
    # -P: no folder ./wandb of old runs in place of a package; the paths are this process's own
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-P", "-c", PROGRAM, *names]
    try:
        child = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
        out, log, end = child.stdout, child.stderr, f"its import ended Python with code {child.returncode}"
    except subprocess.TimeoutExpired as late:
        out, log = (part.decode(errors="replace") if isinstance(part, bytes) else "" for part in (late.stdout, b""))
        end = f"its import took more than {TIMEOUT} s"
    answers = [json.loads(line) for line in out.splitlines() if line.endswith("}")]
    last = [line.strip() for line in log.splitlines() if line.strip()][-1:]
    return answers, ": ".join([end, *last]) if len(answers) < len(names) else None


def _judge(package: Package, answer: dict[str, Any]) -> Package:
    found, problem = answer.get("version"), answer.get("problem")
    if not problem and not is_allowed(found or "", package.wanted):
        problem = f"{found} is not {package.wanted}"
    more = answer.get("more") or {}
    return Package(package.name, package.wanted, package.tested, found, problem, more)


def report_imports() -> None:
    """The child: imports the packages it is given, and prints what came of each; what they print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        print(json.dumps(_import(name)), file=out, flush=True)


def _import(name: str) -> dict[str, Any]:
    place = MODULES.get(_same(name), name.replace("-", "_"))
    try:
        module = importlib.import_module(place)
        if getattr(module, "__file__", None) is None:
            return {"problem": "not installed"}  # a folder of that name
        if place == "tensorboard":
            importlib.import_module("torch.utils.tensorboard")
        return {"version": _version(module, name), "more": _devices(module) if place == "torch" else None}
    except ModuleNotFoundError as error:
        if error.name == place:
            return {"problem": "not installed"}
        return {"problem": _one_line(error)}
    except Exception as error:
        return {"problem": _one_line(error)}


def _version(module: Any, name: str) -> str:
    """What the module itself says, so that what is really imported counts; else what pip installed."""
    own = getattr(module, "__version__", None)
    return own if isinstance(own, str) and own[:1].isdigit() else metadata.version(name)


def _devices(torch: Any) -> dict[str, Any]:
    """What torch computes on beside the CPU."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "free_bytes": free, "total_bytes": total})
    return {
        "gpus": gpus,
        "cuda": torch.version.cuda or torch.version.hip,
        "mps": torch.backends.mps.is_available(),
        "torch.distributed": torch.distributed.is_available(),
    }


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
