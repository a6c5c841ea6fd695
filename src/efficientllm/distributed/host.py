"""This machine's processor and memory, as far as a process may use them. Imports no torch."""

import os
from pathlib import Path

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def allowed_cpus() -> set[int]:
    """Returns the processors, second threads of a core included, that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Returns the cores that this process may run on, without the second threads of a core; at least 1.

    Two threads of one core share its arithmetic units, and a matrix product on both is slower than on one.
    """
    cores = set()
    for cpu in allowed_cpus():
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add((topology / "core_cpus_list").read_text())
        except OSError:  # no Linux, or it does not tell
            cores.add(str(cpu))
    return max(1, len(cores))


def free_memory() -> int:
    """Returns the bytes of memory that are free, and within the container's limit."""
    return min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *memory_limits())


def total_memory() -> int:
    """Returns the bytes of memory of the machine, or the container's limit."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *memory_limits())


def memory_limits() -> list[int]:
    """Returns the container's limits, the largest number there is among them."""
    limits = [2**63]
    for path in CGROUP_LIMITS:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return limits
