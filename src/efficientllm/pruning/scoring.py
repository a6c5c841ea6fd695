"""Scoring: from a model's gradients to the scores that choose, averaged over steps if that is asked for.

Sums stay on the device until a removal is due. To read them the host waits for the device; done before the
optimizer's step, the device would then wait for the host.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from efficientllm.pruning.placement import Placement
from efficientllm.pruning.saliency import Saliency, Scored, Scores, Sums, score_units, smooth, sum_units
from efficientllm.pruning.tracker import UnitTracker

MOST_WAITING = 16  # steps whose sums stay on the device before they join the average

Gradient = Callable[[Tensor], Tensor | None]


class Scorer:
    """The scores of the units that a tracker names.

    Args:
        saliency, scored: as `sum_units` takes them.
        decay: of the moving average that the tracker keeps; 0 keeps none.

    Attributes:
        is_scored: whether the present gradients have been scored, or need not be.
        fishers: the diagonal Fisher by parameter name, if it is known better than g².
    """

    def __init__(
        self, tracker: UnitTracker, placement: Placement, saliency: Saliency, scored: Scored, decay: float
    ) -> None:
        self.tracker, self.placement = tracker, placement
        self.saliency, self.scored, self.decay = saliency, scored, decay
        self.is_scored = False
        self.fishers: Mapping[str, Tensor] | None = None
        self._sums: Sums | None = None
        self._waiting: list[Sums] = []

    def score(self, model: nn.Module, is_due: bool) -> None:
        """Sums up the present gradients of a step in which a removal is due or not; what was summed before is gone."""
        self._sums = self._sum_up(model, _own) if is_due or self.decay else None
        self.is_scored = True

    def take(self, is_due: bool) -> Scores | None:
        """Returns the scores of a step that has been done; None if none is due, or if the gradients were broken."""
        sums, self._sums, self.is_scored = self._sums, None, False
        if sums is None:
            return None
        self._waiting.append(sums)
        scores = self.look() if is_due or len(self._waiting) == MOST_WAITING else None
        return scores if is_due else None

    def look(self) -> Scores | None:
        """Returns the scores that wait on the device, averaged; None if the last are broken."""
        waiting, self._waiting = self._waiting, []
        scores = None
        for sums in waiting:
            scores = score_units(self.tracker.space, sums, self.tracker.retired)
            if scores is not None and self.decay:
                self.tracker.average = scores = smooth(self.tracker.average, scores, self.decay)
        return scores

    def now(self, model: nn.Module, gradient: Gradient | None = None) -> Scores | None:
        """Returns the scores by the present gradients, or by what stands for a parameter's; None if they are broken."""
        sums = self._sum_up(model, gradient or _own)
        return None if sums is None else score_units(self.tracker.space, sums, self.tracker.retired)

    def clear(self) -> None:
        """Forgets what has been summed up."""
        self._sums, self._waiting, self.is_scored = None, [], False

    @torch.no_grad()
    def _sum_up(self, model: nn.Module, gradient: Gradient) -> Sums | None:
        """Returns the summed saliencies of every unit; None without a gradient."""
        params, local = dict(model.named_parameters()), self.placement.local
        grads = {name: gradient(param) for name, param in params.items()}
        if all(grad is None for grad in grads.values()):
            return None
        return sum_units(
            self.tracker.space,
            {name: local(param) for name, param in params.items()},
            {name: None if grad is None else local(grad) for name, grad in grads.items()},
            saliency=self.saliency,
            scored=self.scored,
            retired=self.tracker.retired,
            fishers={name: local(fisher) for name, fisher in self.fishers.items()} if self.fishers else None,
            first_rows={name: self.placement.first_row(param) for name, param in params.items()},
            shapes={name: param.shape for name, param in params.items()},
            add_up=self.placement.sum_shards,
        )


def _own(param: Tensor) -> Tensor | None:
    return param.grad
