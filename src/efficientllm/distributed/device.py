"""The machine: where tensors live, how much memory and how many processor cores there are."""

import os
from pathlib import Path

import torch

from efficientllm.distributed.host import free_memory, physical_cores
from efficientllm.models.load import cpu_has_bf16

LARGE_FROM = 10_000_000  # parameters of a source from which products, not calls, take a CPU's time


def find_device() -> torch.device:
    """Returns this process's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def default_precision(device: torch.device, params: int) -> str:
    """Returns what products are computed in without `--precision`: bf16 where it is faster, for a source of `params`.

    On a CPU without bf16 instructions a bf16 product takes 100 times as long as in float32, and in small models the
    casts cost more than the products gain.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = params >= LARGE_FROM and cpu_has_bf16()
    return "bf16" if fast else "float32"


def default_checkpointing(device: torch.device, params: int, precision: str, compiles: bool) -> str:
    """Returns what is computed again in the backward pass without `--activation-checkpointing` (recompute.py).

    `selective` on a CPU where it takes 4% of a step's time for a quarter of its memory: in float32, for a source that
    is not small (benchmarks/README.md). In bf16 it takes 11%, beside faster products; compiled layers keep less anyway.
    """
    gains = device.type == "cpu" and params >= LARGE_FROM and precision == "float32" and not compiles
    return "selective" if gains else "none"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory has run out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def memory_bytes(device: torch.device) -> int:
    """Returns the memory that is free for this process, in bytes; on a CPU its part of the machine's or container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def held_memory(device: torch.device) -> int | None:
    """Returns the bytes that this process holds: on a GPU the most since the last call, on a CPU what is resident now.

    None where the system does not tell. Never waits for the device.
    """
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def default_threads() -> int:
    """Returns the threads of a process: OMP_NUM_THREADS, or the physical cores, shared by the ranks of this machine."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, physical_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
