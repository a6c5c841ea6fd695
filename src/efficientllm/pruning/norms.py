"""Norms that count live entries, while retired ones still wait to be compacted (docs/method.md section 5).

A stock RMSNorm over `size` entries of which `live` are not zero does what the stock norm of the smaller model does,
with eps·live/size and its output times sqrt(live/size). Both factors are tensors, written in place: a compiled graph
takes them as inputs and stays valid when another unit is retired.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

EPS_NAMES = ("variance_epsilon", "eps")


@dataclass
class Correction:
    """What is kept for one norm: the name and first value of its epsilon, the epsilon in use, the hook that scales.

    Attributes:
        share: of the norm's entries, those that live; what both factors were last written for.
    """

    name: str
    eps: float
    live_eps: Tensor
    hook: RemovableHandle
    share: float | None = None


class LiveNorms:
    """Corrections on the norms of one model.

    Args:
        lasting: whether a norm whose entries all live keeps its correction (a factor of one), because a compiled graph
            would have to be made again when a hook comes or goes.
    """

    def __init__(self, lasting: bool = False) -> None:
        self.lasting = lasting
        self._corrections: dict[nn.Module, Correction] = {}

    def set(self, norm: Any, live: int, size: int) -> None:
        """Makes an RMSNorm over `size` entries, `live` of them not retired, count the live ones."""
        if live == size and not self.lasting:
            self._take_off(norm)
            return
        if norm not in self._corrections:
            self._corrections[norm] = _correct(norm)
        correction = self._corrections[norm]
        if correction.share != live / size:
            correction.share = live / size
            correction.live_eps.fill_(correction.eps * live / size)
            norm.live_scale.fill_(sqrt(live / size))

    def clear(self) -> None:
        """Takes every correction off."""
        for norm in list(self._corrections):
            self._take_off(norm)

    def _take_off(self, norm: Any) -> None:
        correction = self._corrections.pop(norm, None)
        if correction:
            correction.hook.remove()
            setattr(norm, correction.name, correction.eps)
            del norm.live_scale


def rescale(norm: Any, args: Any, output: Any) -> Any:
    """The hook: one function for all norms, so that layers of one shape share a compiled graph."""
    return output * norm.live_scale


def _correct(norm: Any) -> Correction:
    name = next(name for name in EPS_NAMES if hasattr(norm, name))
    eps = getattr(norm, name)
    # float64 without dimensions: takes part in the norm's own precision, whichever that is
    live_eps, scale = (torch.ones((), dtype=torch.float64, device=norm.weight.device) for _ in range(2))
    setattr(norm, name, live_eps)
    norm.live_scale = scale
    hook = norm.register_forward_hook(rescale, prepend=True)  # before one that casts: rounded once
    return Correction(name, eps, live_eps, hook)
