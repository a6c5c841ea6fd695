"""Graphics cards as their data sheets describe them, and a cluster of them. Imports no torch.

Data sheets give matrix FLOP/s of structured sparsity, twice what a dense model gets, and bandwidths of both directions
together; a ring of GPUs sends and receives at once, so these are dense FLOP/s and one direction.
"""

import math
import re
from dataclasses import dataclass, replace

from efficientllm.config.run_config import nearest
from efficientllm.errors import ConfigError
from efficientllm.numbers import parse_count

MFU = 0.4  # model FLOPs utilisation; Llama 3 405B reached 0.38 to 0.43 on H100s (arXiv 2407.21783, table 4)
MACHINE = 8  # GPUs of a machine, as in NVIDIA's DGX and HGX
NETWORK = 50e9  # bytes a second from a GPU to another machine: one 400 Gb/s adapter each (NVIDIA DGX H100 data sheet)


@dataclass(frozen=True)
class GpuSpec:
    """What a GPU can do at most.

    Attributes:
        flops: FLOP/s of dense bf16 matrix products, summed in float32; nan where there are no units for them.
        float32_flops: FLOP/s of float32 products without TF32, which torch leaves off; nan where it is not known.
        memory: bytes, as the vendor counts them; a process sees up to a few hundredths more or less.
        bandwidth: bytes a second that it sends to another GPU of its machine while it receives as many.
    """

    name: str
    flops: float
    float32_flops: float
    memory: float
    bandwidth: float

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it can compute products in, the one that `prune` takes last."""
        return ("float32",) if math.isnan(self.flops) else ("float32", "bf16")

    def peak(self, precision: str) -> float:
        """Returns the FLOP/s of products in a precision; nan where they are not known."""
        return self.flops if precision == "bf16" else self.float32_flops


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA T4 data sheet: 8.1 TFLOPS in float32; PCIe Gen3 32 GB/s. NVIDIA V100 data sheet, SXM2: 15.7; NVLink
        # 300 GB/s. Their matrix units know fp16, not bf16
        GpuSpec("T4", math.nan, 8.1e12, 16e9, 16e9),
        GpuSpec("V100-16GB", math.nan, 15.7e12, 16e9, 150e9),
        GpuSpec("V100-32GB", math.nan, 15.7e12, 32e9, 150e9),
        # NVIDIA A100 data sheet, SXM: 312 TFLOPS, 19.5 in float32; NVLink 600 GB/s
        GpuSpec("A100-40GB", 312e12, 19.5e12, 40e9, 300e9),
        GpuSpec("A100-80GB", 312e12, 19.5e12, 80e9, 300e9),
        # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS with sparsity, 67 in float32; NVLink 900 GB/s
        GpuSpec("H100", 989e12, 67e12, 80e9, 450e9),
        # the same, PCIe: 1,513 with sparsity, 51; PCIe Gen5 128 GB/s (its NVLink bridge joins two cards alone)
        GpuSpec("H100-PCIe", 756e12, 51e12, 80e9, 64e9),
        # NVIDIA H200 data sheet, SXM: as the H100, 141 GB
        GpuSpec("H200", 989e12, 67e12, 141e9, 450e9),
        # NVIDIA HGX B200, an eighth of it: 36 PFLOPS with sparsity, 600 in float32, 1.44 TB; NVLink 1.8 TB/s
        GpuSpec("B200", 2250e12, 75e12, 180e9, 900e9),
        # NVIDIA L4 data sheet: 242 TFLOPS with sparsity, 30.3 in float32; PCIe Gen4 64 GB/s
        GpuSpec("L4", 121e12, 30.3e12, 24e9, 32e9),
        # NVIDIA L40S data sheet: 362.05 TFLOPS, 91.6 in float32; PCIe Gen4 64 GB/s
        GpuSpec("L40S", 362.05e12, 91.6e12, 48e9, 32e9),
        # NVIDIA A10 data sheet: 125 TFLOPS, 31.2 in float32; PCIe Gen4 64 GB/s
        GpuSpec("A10", 125e12, 31.2e12, 24e9, 32e9),
        # NVIDIA A10G data sheet (AWS G5): 70 TFLOPS, 35 in float32; PCIe Gen4 64 GB/s
        GpuSpec("A10G", 70e12, 35e12, 24e9, 32e9),
        # GeForce: matrix FLOP/s that sum in float32; no peer access from the 40 series on, so PCIe is an upper bound
        # NVIDIA Ampere GA102 whitepaper, appendix A: 71 TFLOPS, 35.6 in float32; PCIe Gen4
        GpuSpec("RTX-3090", 71e12, 35.6e12, 24e9, 32e9),
        # NVIDIA Ada whitepaper, appendix A: 165.2 TFLOPS, 82.6 in float32; PCIe Gen4
        GpuSpec("RTX-4090", 165.2e12, 82.6e12, 24e9, 32e9),
        # NVIDIA RTX Blackwell whitepaper, appendix A: 209.5 TFLOPS, 104.8 in float32; PCIe Gen5
        GpuSpec("RTX-5090", 209.5e12, 104.8e12, 32e9, 64e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind.

    Attributes:
        mfu: the part of the cards' FLOP/s that the model's own FLOPs reach, an assumption.
        network: bytes a second that a GPU sends to another machine.
    """

    num_gpus: int
    gpu: GpuSpec
    mfu: float = MFU
    network: float = NETWORK

    @property
    def machine(self) -> int:
        """GPUs of one machine: 8, or the largest divisor below."""
        return max(size for size in range(1, MACHINE + 1) if self.num_gpus % size == 0)

    def bandwidth(self, num_gpus: int) -> float:
        """Returns the bytes a second that each GPU of a ring of that size sends: the slowest link of the ring."""
        return self.gpu.bandwidth if num_gpus <= self.machine else min(self.gpu.bandwidth, self.network)


def read_cluster(
    gpus: str | None = None,
    gpu: str | None = None,
    flops: str | None = None,
    bandwidth: str | None = None,
    gpu_memory: str | None = None,
    mfu: str | None = None,
) -> Cluster | None:
    """Returns the cluster that the flags of the same names describe; None if none is given.

    Raises:
        ConfigError: an unknown GPU, one described in part, or a number that cannot be.
    """
    given = {"--flops": flops, "--bandwidth": bandwidth, "--gpu-memory": gpu_memory}
    if all(text is None for text in (gpus, gpu, mfu, *given.values())):
        return None
    num_gpus = 1 if gpus is None else _positive(gpus, "--gpus")
    numbers = {flag: _positive(text, flag) for flag, text in given.items() if text is not None}
    if gpu is not None:
        spec = find_gpu(gpu)
    else:
        missing = [flag for flag in given if flag not in numbers and (num_gpus > 1 or flag != "--bandwidth")]
        if missing:
            raise ConfigError(
                f"no GPU is named; add --gpu ({', '.join(GPUS)}), or describe another one with {', '.join(missing)}"
            )
        spec = GpuSpec("GPU", flops=0, float32_flops=math.nan, memory=0, bandwidth=math.inf)
    spec = replace(
        spec,
        flops=numbers.get("--flops", spec.flops),
        memory=numbers.get("--gpu-memory", spec.memory),
        bandwidth=numbers.get("--bandwidth", spec.bandwidth),
    )
    return Cluster(num_gpus, spec, _share(mfu), numbers.get("--bandwidth", NETWORK))


def find_gpu(name: str) -> GpuSpec:
    """Returns the GPU of that name; case, spaces and dashes do not matter.

    Raises:
        ConfigError: if it is not in the table.
    """
    names = {_letters(each): each for each in GPUS}
    wanted = _letters(name)
    if wanted in names:
        return GPUS[names[wanted]]
    meant = [names[each] for each in names if wanted and each.startswith(wanted)] or [names[nearest(wanted, names)]]
    raise ConfigError(
        f"--gpu {name} is not one of {', '.join(GPUS)}; did you mean {' or '.join(meant)}? "
        "Describe another one with --flops, --bandwidth and --gpu-memory"
    )


def _letters(name: str) -> str:
    return re.sub("^(nvidia|geforce|rtx)+", "", re.sub("[^a-z0-9]", "", name.lower()))


def _positive(text: str, flag: str) -> int:
    number = parse_count(text, flag)
    if number < 1:
        raise ConfigError(f"{flag} {text} is below 1; give a number of at least 1")
    return number


def _share(text: str | None) -> float:
    try:
        share = MFU if text is None else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"--mfu {text} must be above 0 and at most 1; {MFU} is typical")
    return share
