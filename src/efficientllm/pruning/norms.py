"""Norms that count live entries, while retired ones still wait to be compacted (method.md section 5).

A stock RMSNorm over `size` entries of which `live` are not zero does what the stock norm of the smaller model does,
with eps·live/size and its output times sqrt(live/size).
"""

from math import sqrt
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

EPS_NAMES = ("variance_epsilon", "eps")


class LiveNorms:
    """Corrections on the norms of one model; `set` with live == size takes a correction off."""

    def __init__(self) -> None:
        self._corrected: dict[nn.Module, tuple[str, float, RemovableHandle]] = {}

    def set(self, norm: nn.Module, live: int, size: int) -> None:
        """Makes an RMSNorm over `size` entries, `live` of them not retired, count the live ones."""
        if norm in self._corrected:
            name, eps, handle = self._corrected.pop(norm)
            handle.remove()
            setattr(norm, name, eps)
        if live == size:
            return
        name = next(name for name in EPS_NAMES if hasattr(norm, name))
        eps = getattr(norm, name)
        scale = sqrt(live / size)

        def rescale(module: nn.Module, args: Any, output: Any) -> Any:
            return output * scale

        self._corrected[norm] = (name, eps, norm.register_forward_hook(rescale))
        setattr(norm, name, eps * live / size)

    def clear(self) -> None:
        """Takes every correction off."""
        for norm in list(self._corrected):
            self.set(norm, 1, 1)
