"""The engine of one process; those of several (parallel.py) override what more than one needs."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efficientllm.pruning.placement import Placement
from efficientllm.pruning.removal import compact_
from efficientllm.pruning.saliency import Retired
from efficientllm.space.dims import Space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAITING_UNITS = 64  # retired channels for one compaction, where another shape is dear: on a GPU, compiled, or sharded

Precision = Literal["float32", "bf16"]


class Engine(Placement):
    """One process. The others override what more than one needs.

    Attributes:
        device: where this rank computes.
        precision: of the products; weights, moments and the sums of gradients are float32 in either.
        compaction_tile: retired units that wait for one compaction; None for the multiples that the result has.
        compilations: graphs compiled so far.
        shards: ranks that share one copy.
    """

    name = "one"
    shards = 1
    compaction_tile: int | None = None

    def __init__(self, device: torch.device, precision: Precision = "float32", compiles: bool = False) -> None:
        self.device, self.precision, self.compiles = device, precision, compiles
        self.compilations = 0
        if device.type != "cpu" or compiles:
            self.compaction_tile = WAITING_UNITS

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    def wrap(self, model: "PreTrainedModel") -> Any:
        """Returns the model to train, in float32 on its device; of a model on the meta device the shapes alone."""
        if self.precision == "bf16":
            narrow_stream_(model)
        self._place(model)
        self._compile(model)
        return model

    def frozen(self, model: "PreTrainedModel") -> Any:
        """Returns a frozen model in eval mode: on its device, without gradients, its weights as products take them."""
        freeze_(model, self.precision)
        owned_(model).to(self.device)
        self._compile(model)
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns what a forward pass runs under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def forward(self, model: nn.Module) -> Callable[..., Any]:
        """Returns what to call for a forward pass that will be differentiated."""
        return model

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Returns what a micro-batch runs under: gradients are summed over copies in the last one alone."""
        return nullcontext()

    def compact(self, model: nn.Module, optimizer: Optimizer, space: Space, units: Retired) -> nn.Module:
        compact_(model, optimizer, space, units)
        self.forget_graphs()
        return model

    def all_reduce_mean(self, number: Tensor) -> Tensor:
        """Returns the mean over ranks."""
        return number

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Returns the largest that any rank gives, of each number."""
        return list(numbers)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Returns a tensor that may be sharded, or summed only in part, as a whole one here."""
        return tensor

    def barrier(self) -> None:
        """Returns when every rank has come here."""

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        """Lets the main rank do something before the others continue, and returns to it what came of it.

        Raises:
            EfficientLLMError: on every rank, if it failed; the main rank's own error says why.
        """
        return work()

    def gather(self, model: nn.Module) -> Any:
        """Returns the model whole; it holds only on the main rank."""
        return model

    def checkpoint_shard(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns what this rank writes of tensors that a checkpoint is to hold."""
        return tensors

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function as it is called in training: with --compile one graph for every shape."""
        if not self.compiles:
            return function
        # a hook that has put an input down need not do so again where a layer is computed for the second time
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        return torch.compile(function, dynamic=False, backend=self._count_and_compile)

    def forget_graphs(self) -> None:
        """Drops compiled graphs: those of shapes that are gone would use up the limit that torch sets."""
        if self.compiles:
            torch.compiler.reset()

    def close(self) -> None:
        """Leaves the group of ranks."""

    def _place(self, model: Any) -> None:
        if any(param.is_meta for param in model.parameters()):
            model.to_empty(device=self.device)
            model.tie_weights()  # a move has untied them
        owned_(model).to(self.device, training_dtype(model))

    def _compile(self, model: Any) -> None:
        """Compiles the layers' forward functions, one graph for all of a shape; hooks stay outside."""
        for layer in model.model.layers if self.compiles else ():
            layer.forward = self.compiled(layer.forward)

    def _count_and_compile(self, graph: Any, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        made = compile_fx(graph, inputs)
        self.compilations += 1  # not before: torch leaves a first try, and comes again, where it meets a scalar
        return made


def narrow_stream_(model: nn.Module) -> None:
    """Lets embeddings and norms give what products take under autocast, which would leave the stream in float32.

    So a norm's result is cast once, not for each product that reads it, and what a layer adds moves half the bytes.
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear) and any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(_as_products_take_it)


def _as_products_take_it(module: nn.Module, args: Any, output: Any) -> Any:
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output


def training_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype of weights and moments: float32, or a model's own where that is wider."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def freeze_(model: nn.Module, precision: Precision) -> None:
    """Puts a model into evaluation mode, without gradients, its parameters (not its buffers) in the products' dtype."""
    model.eval().requires_grad_(False)
    dtype = torch.bfloat16 if precision == "bf16" else training_dtype(model)
    for param in model.parameters():
        param.data = param.data.to(dtype)


def on_meta(model: "PreTrainedModel") -> Any:
    """Returns a copy without weights: ties, settings and methods as they are, no memory."""
    tensors = [*model.parameters(), *model.buffers()]
    empty: dict[int, Any] = {id(each): each.detach().to("meta") for each in tensors}
    for param in model.parameters():
        empty[id(param)] = nn.Parameter(empty[id(param)], requires_grad=param.requires_grad)
    return copy.deepcopy(model, empty)


def twin(model: "PreTrainedModel") -> Any:
    """Returns a copy that shares the weights, to be wrapped for reading only: FSDP empties what it is given."""
    shared: dict[int, Any] = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def owned_(model: nn.Module) -> nn.Module:
    """Moves weights out of the mapped file that they were read from: its alignment would change how sums round."""
    with torch.no_grad():
        for param in model.parameters():
            param.data = param.data.clone()
    return model
