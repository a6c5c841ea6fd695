"""The machine: where tensors live, in what precision they are multiplied, how much memory there is."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def find_device() -> torch.device:
    """Returns the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_for(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Returns what a forward pass runs under: bf16 autocast on a GPU, float32 on a CPU.

    Weights and moments are float32 everywhere: an AdamW step on bf16 weights would round most updates away.
    """
    if device.type == "cuda":
        return partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    return nullcontext


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
