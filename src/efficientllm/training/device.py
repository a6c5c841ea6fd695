"""The machine: where tensors live, how much memory and how many processor cores there are."""

import os
from pathlib import Path

import torch

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def find_device() -> torch.device:
    """Returns the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_precision(device: torch.device) -> str:
    """Returns what products are computed in without `--precision`: bf16 on a GPU that has it, float32 elsewhere."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def memory_bytes(device: torch.device) -> int:
    """Returns the memory that is free on the device, in bytes; on a CPU within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in CGROUP_LIMITS:
        try:
            free = min(free, int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return free


def physical_cores() -> int:
    """Returns the cores that this process may run on, without the second threads of a core; at least 1.

    Two threads of one core share its arithmetic units, and a matrix product on both is slower than on one.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add((topology / "core_cpus_list").read_text())
        except OSError:  # no Linux, or it does not tell
            cores.add(str(cpu))
    return max(1, len(cores))


def default_threads() -> int:
    """Returns the threads of a process: OMP_NUM_THREADS, or the physical cores, shared by the ranks of this machine."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, physical_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
