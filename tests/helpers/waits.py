"""How often a program would wait for a GPU, counted on the CPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: numbers taken from tensors, solves that look for errors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func in (aten._local_scalar_dense.default, aten._linalg_check_errors.default)
        return func(*args, **(kwargs or {}))
