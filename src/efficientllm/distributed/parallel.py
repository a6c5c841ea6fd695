"""The engines of several ranks, DDP and FSDP2 under torchrun, behind the calls of one process (engine.py).

With checkpoint.py the only file that imports torch.distributed. DDP keeps a whole copy on every rank and sums
gradients; FSDP shards every parameter, gradient and moment by rows over the ranks (or over those of one replica: hybrid
sharding).
"""

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from efficientllm.distributed.engine import WAITING_UNITS, Engine, Precision, freeze_, on_meta, training_dtype
from efficientllm.distributed.rendezvous import is_restart, rendezvous
from efficientllm.errors import ConfigError, EfficientLLMError, TrainingError
from efficientllm.models.llama_mistral import relabel_llama_
from efficientllm.pruning.removal import compact_, kept_entries, select, take_
from efficientllm.pruning.saliency import Retired
from efficientllm.pruning.selection import Removal
from efficientllm.space.dims import Space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATIENCE = timedelta(hours=12)  # ranks wait while the first one tokenises; torchrun ends them if one dies
CLAIMED = "run folder"  # in torchrun's store


class _Ranks(Engine):
    """What DDP and FSDP share: a process group, and the calls that need nothing but it."""

    def __init__(self, device: torch.device, precision: Precision = "float32", compiles: bool = False) -> None:
        super().__init__(device, precision, compiles)
        _join(device)
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()

    def all_reduce_mean(self, number: Tensor) -> Tensor:
        total = number.clone()
        dist.all_reduce(total)
        return total / self.num_ranks

    def all_reduce_max(self, *numbers: int) -> list[int]:
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [int(value) for value in values]

    def barrier(self) -> None:
        dist.barrier()

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        result, failure = None, None
        try:
            result = work() if self.is_main else None
        except (EfficientLLMError, OSError) as error:
            failure = error
        (failed,) = self.all_reduce_max(failure is not None)
        if failed:
            raise failure or TrainingError("the main rank failed")
        return result

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
        extremes = torch.tensor([number, -number])
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
        super().wrap(model)
        self._sync(model, first=True)
        return model

    def forward(self, model: nn.Module) -> Callable[..., Any]:
        assert self._replica is not None
        return self._replica

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        assert self._replica is not None
        return nullcontext() if last else self._replica.no_sync()

    def compact(self, model: nn.Module, optimizer: Optimizer, space: Space, units: Retired) -> nn.Module:
        self._replica = None  # its hooks sit on the old parameters
        super().compact(model, optimizer, space, units)
        self._sync(model)
        return model

    def checkpoint_shard(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[name] for name in sorted(tensors)[self.rank :: self.num_ranks]}

    def _sync(self, model: nn.Module, first: bool = False) -> None:
        self._replica = DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=first
        )


class FSDP(_Ranks):
    """Parameters, gradients and moments sharded by rows: over all ranks, or over `shards` of them in each replica."""

    name = "fsdp"
    compaction_tile = WAITING_UNITS  # each compaction shards the model again

    def __init__(
        self, device: torch.device, precision: Precision = "float32", compiles: bool = False, shards: int | None = None
    ) -> None:
        super().__init__(device, precision, compiles)
        shards = shards or int(os.environ.get("LOCAL_WORLD_SIZE", self.num_ranks))
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
        # gathered weights are bf16; gradients are summed and kept in float32
        half = precision == "bf16"
        self._policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the policy casts

    def wrap(self, model: "PreTrainedModel") -> Any:
        """Returns the model sharded in float32; a rank takes its own rows, and `model` may be mapped from a file.

        `model` is left without weights, for whoever still holds it.
        """
        relabel_llama_(model)
        self._skeleton = on_meta(model).to(training_dtype(model))
        return self._filled(self._shard(copy.deepcopy(self._skeleton)), model)

    def frozen(self, model: "PreTrainedModel") -> Any:
        skeleton = on_meta(model)
        freeze_(skeleton, self.precision)
        return self._filled(self._shard(skeleton), model)

    def _filled(self, sharded: Any, model: nn.Module) -> Any:
        """Returns a sharded model without memory with the weights and buffers of a whole one."""
        sharded.to_empty(device=self.device)
        source = dict(model.named_parameters())
        with torch.no_grad():
            for name, param in sharded.named_parameters():
                mine, first = self.local(param), self.first_row(param)
                if not source[name].is_meta:
                    mine.copy_(source[name][first : first + len(mine)])
        self._finish(sharded, model)
        model.to("meta")
        return sharded

    def accumulate(self, model: Any, last: bool) -> AbstractContextManager[Any]:
        # every pass's gradients go to their shards: whole, they would take what sharding saves; copies meet in the last
        model.set_requires_all_reduce(last)
        return nullcontext()

    def full_tensor(self, tensor: Tensor) -> Tensor:
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
        """Rebuilds the model at the smaller shape and moves weights and moments there, a parameter at a time.

        Beside its shards a rank holds at most four times the largest matrix that loses rows: gathered, whole
        without them, and in the making of either. The vocabulary never shrinks, so that is a matrix of a layer. An old
        parameter's memory is freed before the next one comes.
        """
        kept = kept_entries(model, space, units)
        compact_(self._skeleton, None, space, units)
        self.forget_graphs()
        smaller: nn.Module = self._shard(copy.deepcopy(self._skeleton))
        old = dict(model.named_parameters())
        replaced: dict[nn.Parameter, nn.Parameter] = {}
        for path, module in smaller.named_modules():
            names = {f"{path}.{name}": name for name, _ in module.named_parameters(recurse=False)}
            if old.keys().isdisjoint(names):  # a head tied to the embedding
                continue
            module.to_empty(device=self.device, recurse=False)
            for name, attribute in names.items():
                self._move(old[name], getattr(module, attribute), kept.get(name, []), optimizer)
                replaced[old[name]] = getattr(module, attribute)
        self._finish(smaller, model)
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(param, param) for param in group["params"]]
        smaller.train(model.training)
        return smaller

    def _move(self, old: nn.Parameter, new: nn.Parameter, axes: list[tuple[int, Tensor]], optimizer: Optimizer) -> None:
        """Gives a new parameter what stays of an old one's weights, gradient and moments, and frees the old one."""
        new.grad, state = take_(old, optimizer, lambda tensor: self._cut(tensor, axes, new))
        if state:
            optimizer.state[new] = state
        with torch.no_grad():
            self.local(new).copy_(self.local(self._cut(old, axes, new)))
        self.local(old).untyped_storage().resize_(0)

    def gather(self, model: nn.Module) -> Any:
        plain: Any = copy.deepcopy(self._skeleton)
        if self.is_main:
            plain.to_empty(device="cpu")
            plain.tie_weights()
            buffers = dict(model.named_buffers())
            for name, buffer in plain.named_buffers():
                buffer.copy_(buffers[name])
        targets = dict(plain.named_parameters())
        with torch.no_grad():
            for name, param in model.named_parameters():
                full = self.full_tensor(param.detach())
                if self.is_main:
                    targets[name].copy_(full)
        return plain

    def _shard(self, model: Any) -> Any:
        for layer in model.model.layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=self._policy)
        return fully_shard(model, mesh=self.mesh, mp_policy=self._policy)

    def _finish(self, sharded: Any, source: nn.Module) -> None:
        """Makes a sharded model whose parameters have been set ready to compute; buffers come from `source`."""
        sharded.tie_weights()  # a move has untied them
        self._copy_buffers(source, sharded)
        sharded._apply(lambda tensor: tensor)  # FSDP reads its parameters again
        self._compile(sharded)

    def _copy_buffers(self, source: nn.Module, target: nn.Module) -> None:
        """Gives `target` the buffers of `source`, unless they are to be read from a checkpoint."""
        found = dict(source.named_buffers())
        for path, module in target.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                given = found[f"{path}.{name}" if path else name]
                filled = torch.empty_like(buffer, device=self.device)
                setattr(module, name, filled if given.is_meta else filled.copy_(given))

    def _cut(self, tensor: Tensor, axes: list[tuple[int, Tensor]], like: Tensor) -> Any:
        """Returns a sharded tensor without what is removed, sharded again; rows that all stay need no communication."""
        assert isinstance(tensor, DTensor)
        if all(axis != 0 for axis, _ in axes):
            local = select(tensor.to_local(), axes)
            return DTensor.from_local(
                local, tensor.device_mesh, tensor.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        whole = select(tensor.full_tensor(), axes)
        return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


def started_before() -> bool:
    """Returns whether torchrun has started this process before, because a worker died, and the run folder was made.

    Asked once, at the start.
    """
    if "WORLD_SIZE" not in os.environ:
        return False
    store, rank, _ = _rendezvous()
    return is_restart(store, rank) and store.check([CLAIMED])


def claim_folder() -> None:
    """Notes that the run folder is this job's own: what torchrun restarts continues with it."""
    if "WORLD_SIZE" in os.environ:
        _rendezvous()[0].set(CLAIMED, "1")


def least_of_ranks(number: int, device: torch.device) -> int:
    """Returns the least that any rank gives: what all decide by, where each would decide otherwise."""
    if "WORLD_SIZE" not in os.environ:
        return number
    _join(device)
    least = torch.tensor(number)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def _join(device: torch.device) -> None:
    """Makes the group of all ranks, if there is none yet."""
    if dist.is_initialized():
        return
    store, rank, num_ranks = _rendezvous()
    store = dist.PrefixStore(rendezvous(store, rank, num_ranks), store)  # type: ignore[attr-defined]
    # numbers that decide what is done next are on the CPU: agreeing on them does not halt the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=PATIENCE)


def _rendezvous() -> tuple[Any, int, int]:
    found: tuple[Any, int, int] = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))  # type: ignore[attr-defined]
    return found


def start_engine(
    name: str, device: torch.device, precision: Precision = "float32", compiles: bool = False, shards: int | None = None
) -> Engine:
    """Returns the engine of this process: `ddp` or `fsdp` under torchrun, the plain one without.

    Raises:
        ConfigError: if the ranks cannot be cut into replicas of `shards` ranks (default: those of one machine).
    """
    if "WORLD_SIZE" not in os.environ:
        return Engine(device, precision, compiles)
    return DDP(device, precision, compiles) if name == "ddp" else FSDP(device, precision, compiles, shards)
