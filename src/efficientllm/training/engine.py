"""Engines: one process, DDP or FSDP2 under torchrun, behind the same calls; on one process each is the identity.

The only file that imports torch.distributed. DDP keeps a whole copy on every rank and sums gradients; FSDP shards every
parameter, gradient and moment by rows over the ranks (or over those of one replica: hybrid sharding).
"""

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from efficientllm.errors import ConfigError, TrainingError
from efficientllm.pruning.layout import Layout
from efficientllm.pruning.relabel import relabel_llama_
from efficientllm.pruning.removal import compact_, kept_entries, select, state_tensors
from efficientllm.pruning.saliency import Retired
from efficientllm.pruning.selection import Removal
from efficientllm.space.dims import Space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATIENCE = timedelta(hours=12)  # ranks wait while the first one tokenises; torchrun ends them if one dies


class Engine(Layout):
    """One process. The others override what more than one needs.

    Attributes:
        device: where this rank computes.
        compaction_tile: retired units that wait for one compaction; None for the multiples that the result has.
        shards: ranks that share one copy.
    """

    name = "one"
    shards = 1
    compaction_tile: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    def wrap(self, model: "PreTrainedModel") -> Any:
        """Returns the model to train, on its device."""
        return model.to(self.device)

    def forward(self, model: nn.Module) -> Callable[..., Any]:
        """Returns what to call for a forward pass that will be differentiated."""
        return model

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Returns what a micro-batch runs under: gradients are summed over ranks in the last one alone."""
        return nullcontext()

    def mean(self, number: Tensor) -> Tensor:
        """Returns the mean over ranks."""
        return number

    def largest(self, *numbers: int) -> list[int]:
        """Returns the largest that any rank gives, of each number."""
        return list(numbers)

    def whole(self, tensor: Tensor) -> Tensor:
        """Returns a tensor that may be sharded, or summed only in part, as one that stands here."""
        return tensor

    def wait(self) -> None:
        """Returns when every rank has come here."""

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Lets the main rank go through a block before the others: it writes what they read."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def gather(self, model: nn.Module, optimizer: Optimizer | None = None) -> tuple[Any, dict[str, Tensor]]:
        """Returns the model whole and the optimizer's tensors by "field:parameter"; both hold only on the main rank."""
        params = dict(model.named_parameters())
        moments = {
            f"{field}:{name}": value
            for name, param in params.items()
            for field, value in (optimizer.state.get(param, {}) if optimizer else {}).items()
            if isinstance(value, Tensor)
        }
        return model, moments

    def scatter_moments_(self, moments: Mapping[str, Tensor], optimizer: Optimizer, model: nn.Module) -> None:
        """Gives the optimizer its tensors back, by "field:parameter", each rank its own part."""
        params = dict(model.named_parameters())
        for key, tensor in moments.items():
            field, _, name = key.partition(":")
            param = params[name]
            # Adam keeps its step counter on the CPU unless it is fused
            if tensor.numel() == 1 and param.shape != tensor.shape:
                optimizer.state[param][field] = tensor.to(
                    param.device if optimizer.defaults.get("fused") else "cpu", copy=True
                )
            else:
                optimizer.state[param][field] = self._like(tensor.to(param.device, copy=True), param)

    def close(self) -> None:
        """Leaves the group of ranks."""

    def _like(self, tensor: Tensor, param: Tensor) -> Tensor:
        return tensor


class _Ranks(Engine):
    """What DDP and FSDP share: a process group, and the calls that need nothing but it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        if not dist.is_initialized():
            store, rank, num_ranks = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))  # type: ignore[attr-defined]
            # torchrun keeps the store, and with it a dead attempt's addresses
            store = dist.PrefixStore(f"attempt-{num_restarts()}", store)  # type: ignore[attr-defined]
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=PATIENCE)
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()

    def mean(self, number: Tensor) -> Tensor:
        total = number.clone()
        dist.all_reduce(total)
        return total / self.num_ranks

    def largest(self, *numbers: int) -> list[int]:
        values = torch.tensor(numbers, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [int(value) for value in values]

    def wait(self) -> None:
        dist.barrier()

    def sum_to(self, tensor: Tensor, rank: int) -> Tensor:
        dist.reduce(tensor, rank)
        return tensor

    def from_rank(self, tensor: Tensor, rank: int) -> Tensor:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, rank)
        return tensor

    def check_same(self, removals: Sequence[Removal]) -> None:
        chosen = repr([(removal.kind, removal.units) for removal in removals])
        number = int.from_bytes(hashlib.sha256(chosen.encode()).digest()[:7], "big")
        extremes = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        if int(extremes[0]) != -int(extremes[1]):
            everyone: list[Any] = [None] * self.num_ranks
            dist.all_gather_object(everyone, chosen)
            other = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
            raise TrainingError(
                f"ranks 0 and {other} chose different units: {everyone[0]} and {everyone[other]}; nothing was removed"
            )

    def close(self) -> None:
        dist.destroy_process_group()


class DDP(_Ranks):
    """A whole copy of model and moments on every rank."""

    name = "ddp"
    _replica: DistributedDataParallel | None = None

    def wrap(self, model: "PreTrainedModel") -> Any:
        self._sync(model.to(self.device))
        return model

    def forward(self, model: nn.Module) -> Callable[..., Any]:
        assert self._replica is not None
        return self._replica

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        assert self._replica is not None
        return nullcontext() if last else self._replica.no_sync()

    def compact(self, model: nn.Module, optimizer: Optimizer, space: Space, units: Retired) -> nn.Module:
        self._replica = None  # its hooks sit on the old parameters
        compact_(model, optimizer, space, units)
        self._sync(model)
        return model

    def _sync(self, model: nn.Module) -> None:
        self._replica = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=False)


class FSDP(_Ranks):
    """Parameters, gradients and moments sharded by rows: over all ranks, or over `shards` of them in each replica."""

    name = "fsdp"
    compaction_tile = 64  # each compaction shards the model anew

    def __init__(self, device: torch.device, shards: int) -> None:
        super().__init__(device)
        if self.num_ranks % shards:
            raise ConfigError(
                f"--shards {shards} does not divide the {self.num_ranks} ranks; give a divisor of {self.num_ranks}"
            )
        self.shards = shards
        self.mesh: DeviceMesh
        if shards == self.num_ranks:
            self.mesh = init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
        else:
            replicas = self.num_ranks // shards
            self.mesh = init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replica", "shard"))
        self._shards = self.mesh["shard"]

    def wrap(self, model: "PreTrainedModel") -> Any:
        relabel_llama_(model)
        self._skeleton = copy.deepcopy(model).to("meta")
        self._tie(self._skeleton)
        return self._shard(model.to(self.device))

    def accumulate(self, model: Any, last: bool) -> AbstractContextManager[Any]:
        model.set_requires_gradient_sync(last)
        return nullcontext()

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def first_row(self, tensor: Tensor) -> int:
        chunk = -(-tensor.shape[0] // self._shards.size())
        return min(chunk * self._shards.get_local_rank(), tensor.shape[0])

    def sum_shards(self, parts: list[Tensor]) -> list[Tensor]:
        fused = torch.cat(parts)
        dist.all_reduce(fused, group=self._shards.get_group())
        return list(torch.split(fused, [len(part) for part in parts]))

    def compact(self, model: nn.Module, optimizer: Optimizer, space: Space, units: Retired) -> nn.Module:
        """Builds the model anew at the smaller shape and moves weights and moments there, a parameter at a time.

        Beside the new shards, one parameter at a time stands whole on a rank, the embedding at worst, and an old one's
        memory is freed before the next one comes.
        """
        kept = kept_entries(model, space, units)
        compact_(self._skeleton, None, space, units)
        smaller: nn.Module = self._shard(copy.deepcopy(self._skeleton))
        smaller.to_empty(device=self.device)
        self._tie(smaller)
        old = dict(model.named_parameters())
        replaced: dict[nn.Parameter, nn.Parameter] = {}
        for name, param in smaller.named_parameters():
            source, axes = old[name], kept.get(name, [])
            with torch.no_grad():
                self.local(param).copy_(self.local(self._cut(source, axes, param)))
            moments = {key: self._cut(each, axes, param) for key, each in state_tensors(optimizer, source).items()}
            if source in optimizer.state:
                optimizer.state[param] = {**optimizer.state.pop(source), **moments}
            if source.grad is not None:
                param.grad = self._cut(source.grad, axes, param)
            replaced[source] = param
            source.grad = None
            self.local(source).untyped_storage().resize_(0)
        buffers = dict(model.named_buffers())
        for name, buffer in smaller.named_buffers():
            buffer.copy_(buffers[name])
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(param, param) for param in group["params"]]
        smaller.train(model.training)
        return smaller

    def gather(self, model: nn.Module, optimizer: Optimizer | None = None) -> tuple[Any, dict[str, Tensor]]:
        plain = copy.deepcopy(self._skeleton)
        if self.is_main:
            plain.to_empty(device="cpu")
            self._tie(plain)
        params = dict(model.named_parameters())
        moments = {}
        targets = dict(plain.named_parameters())
        with torch.no_grad():
            for name, param in params.items():
                full = self.whole(param.detach())
                if self.is_main:
                    targets[name].copy_(full)
                for field, value in (optimizer.state.get(param, {}) if optimizer else {}).items():
                    if isinstance(value, Tensor):
                        full = self.whole(value)
                        if self.is_main:
                            moments[f"{field}:{name}"] = full.cpu()
            if self.is_main:
                buffers = dict(model.named_buffers())
                for name, buffer in plain.named_buffers():
                    buffer.copy_(buffers[name])
        return plain, moments

    def _shard(self, model: Any) -> Any:
        for layer in model.model.layers:
            fully_shard(layer, mesh=self.mesh)
        return fully_shard(model, mesh=self.mesh)

    def _tie(self, model: Any) -> None:
        """Ties again what a move to another device has untied."""
        model.tie_weights()

    def _cut(self, tensor: Tensor, axes: list[tuple[int, Tensor]], like: Tensor) -> Any:
        """Returns a sharded tensor without what goes, sharded anew; rows that all stay need no communication."""
        assert isinstance(tensor, DTensor)
        if all(axis != 0 for axis, _ in axes):
            local = select(tensor.to_local(), axes)
            return DTensor.from_local(
                local, tensor.device_mesh, tensor.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        return self._like(select(tensor.full_tensor(), axes), like)

    def _like(self, tensor: Tensor, param: Tensor) -> Tensor:
        assert isinstance(param, DTensor)
        return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


def num_restarts() -> int:
    """Returns how often torchrun has started the workers again after one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def start_engine(name: str, device: torch.device, shards: int | None = None) -> Engine:
    """Returns the engine of this process: `ddp` or `fsdp` under torchrun, the plain one without.

    Raises:
        ConfigError: if the ranks cannot be cut into replicas of `shards` ranks (default: those of one machine).
    """
    if "WORLD_SIZE" not in os.environ:
        return Engine(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if name == "ddp":
        return DDP(device)
    return FSDP(device, shards or int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
