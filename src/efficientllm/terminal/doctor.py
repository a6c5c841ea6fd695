"""`efficientllm doctor`: whether a run would work here, and what this machine has. Imports no torch itself."""

import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficientllm import __version__
from efficientllm.distributed.host import allowed_cpus, free_memory, physical_cores, total_memory
from efficientllm.errors import EfficientLLMError
from efficientllm.models.load import BF16_INSTRUCTIONS
from efficientllm.terminal.packages import Package, is_allowed, read_claims, try_packages

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")  # as Linux names them
HUB_VARIABLES = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
)
WIDTH = 80


def doctor(as_json: bool) -> int:
    """Prints versions, devices, memory, disk, extras and the hub's variables.

    Raises:
        EfficientLLMError: what every run needs is missing, too old or broken.
    """
    found = examine()
    print(json.dumps(found, indent=2) if as_json else "\n".join(report_lines(found)), flush=True)
    if problems := found["problems"]:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise EfficientLLMError(problems[0] + more)
    return 0


def examine() -> dict[str, Any]:
    """Returns all that `--json` prints; `problems` is empty if a plain `prune` works."""
    python, claims = read_claims()
    tried = try_packages([package for group in claims.values() for package in group])
    extras = {name: [tried[package.name] for package in group] for name, group in claims.items()}
    needed = extras.pop("")
    problems = []
    if not is_allowed(platform.python_version(), python):
        problems.append(f"Python {platform.python_version()} is not {python}; make an environment with one that is")
    problems += [_advice(package) for package in needed if package.problem]
    torch = tried["torch"].more
    return {
        "efficientllm": __version__,
        "python": {"version": platform.python_version(), "wanted": python, "executable": sys.executable},
        "system": f"{platform.system()} {platform.machine()}",
        "packages": [_row(package) for package in needed],
        "extras": {name: _extra(name, parts) for name, parts in extras.items()},
        "processor": _processor(),
        "gpus": torch.get("gpus", []),
        "gpus_unused": [] if torch.get("gpus") else _gpus_of_driver(),
        "mps": torch.get("mps", False),
        "cuda": torch.get("cuda"),
        "memory": {"free_bytes": free_memory(), "total_bytes": total_memory()},
        "disk": {str(place): _free_disk(place) for place in dict.fromkeys((Path.cwd(), hub_cache()))},
        "torchrun": _torchrun() if torch.get("torch.distributed") else None,
        "hub": {name: os.environ[name] for name in HUB_VARIABLES if name in os.environ},
        "problems": problems,
    }


def _row(package: Package) -> dict[str, Any]:
    return {name: getattr(package, name) for name in ("name", "found", "wanted", "tested", "problem")}


def _advice(package: Package) -> str:
    """What is wrong with a package that every run needs, and what to do."""
    return f"{package.name}: {package.problem}; run pip install '{package.name}{package.wanted}'"


def _extra(name: str, packages: list[Package]) -> dict[str, Any]:
    works = not any(package.problem for package in packages)
    install = None if works else f"pip install 'efficientllm[{name}]'"
    return {"works": works, "packages": [_row(package) for package in packages], "install": install}


def _processor() -> dict[str, Any]:
    """The CPU's name, the cores and threads that this process may use, and the instructions that products use."""
    try:
        pairs = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        facts = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
    except OSError:
        facts = {}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "name": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": physical_cores(),
        "threads": len(allowed_cpus()),
        "machine_threads": os.cpu_count(),
        "instructions": [each for each in INSTRUCTIONS if each in flags] if flags else None,
        "bf16": bool(BF16_INSTRUCTIONS.intersection(flags)) if flags else None,
    }


def _gpus_of_driver() -> list[str]:
    """The GPUs that the driver shows, for when torch shows none."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def hub_cache() -> Path:
    """Returns where the Hugging Face hub keeps what it downloads, by the rule of huggingface_hub, not imported."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub").expanduser()


def _free_disk(place: Path) -> int:
    anchor = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(anchor).free


def _torchrun() -> str | None:
    """The torchrun of this Python, else one on PATH."""
    own = Path(sys.executable).parent / "torchrun"
    return str(own) if own.exists() else shutil.which("torchrun")


def report_lines(found: dict[str, Any]) -> Iterator[str]:
    """The report as lines of at most WIDTH characters, but for paths."""
    yield f"efficientllm {found['efficientllm']}, Python {found['python']['version']}, {found['system']}"
    yield ""
    yield _columns("package", "found", "needs", "tested with")
    for row in found["packages"]:
        yield _columns(row["name"], row["found"] or "-", row["wanted"], row["tested"] or "-")
        if row["problem"]:
            yield from _fold("", row["problem"], mark="! ")
    yield ""
    yield f"{'extra':<16} works"
    for name, extra in found["extras"].items():
        if extra["works"]:
            yield from _fold(name, "yes: " + ", ".join(f"{row['name']} {row['found']}" for row in extra["packages"]))
        else:
            wrong = "; ".join(f"{row['name']}: {row['problem']}" for row in extra["packages"] if row["problem"])
            yield from _fold(name, f"no: {wrong}")
            yield from _fold("", extra["install"])
    yield ""
    for name, text in _machine(found):
        yield from _fold(name, text)
    yield ""
    yield f"{len(found['problems'])} problems" if found["problems"] else "prune works here"


def _machine(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cpu, memory = found["processor"], found["memory"]
    threads = f"{cpu['threads']} of {cpu['machine_threads']} threads"
    yield "processor", f"{cpu['name']}; {cpu['cores']} cores ({threads}) for this process"
    if cpu["instructions"] is None:
        yield "instructions", "this system does not tell"
    else:
        speed = "fast" if cpu["bf16"] else "slow, none for bf16"
        yield "instructions", f"{' '.join(cpu['instructions']) or 'none that matter'} (bf16 on the CPU: {speed})"
    for gpu in found["gpus"]:
        yield "GPU", f"{gpu['name']}, {_gb(gpu['free_bytes'])} of {_gb(gpu['total_bytes'])} free, CUDA {found['cuda']}"
    if found["gpus_unused"]:
        why = f"torch is built for CUDA {found['cuda']}" if found["cuda"] else "torch is built for the CPU alone"
        yield "GPU", f"the driver has {', '.join(found['gpus_unused'])}, torch sees none: {why}"
    elif not found["gpus"]:
        yield "GPU", "Apple's, by MPS; prune uses the CPU" if found["mps"] else "none"
    yield "memory", f"{_gb(memory['free_bytes'])} of {_gb(memory['total_bytes'])} free"
    for place, free in found["disk"].items():
        yield "disk", f"{_gb(free)} free for {place}"
    yield "torchrun", found["torchrun"] or "not found"
    yield "hub", " ".join(f"{name}={value}" for name, value in found["hub"].items()) or "no HF_… variable is set"


def _columns(*cells: str) -> str:
    return f"{cells[0]:<16} {cells[1]:<16} {cells[2]:<16} {cells[3]}".rstrip()


def _fold(name: str, text: str, mark: str = "") -> list[str]:
    indent = " " * 17
    start = f"{name:<16} {mark}"
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
