"""The loss of a student that also learns from a frozen teacher, in chunks as in cross_entropy.py.

    z, t  (n, vocab)  logits of student and teacher      q, p  softmax(z/T), softmax(t/T)      w, T  weight, temperature

    loss = (1 - w) · CE(z, next token) + w · T² · KL(p ‖ q)   [+ W · distance of hidden states]

T² keeps the gradient by z of one size, regardless of T (Hinton et al., arXiv 1503.02531, section 2): it is T · (q - p).
A chunk's logits of both models are in memory at once, so a chunk has half as many tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientllm.training.cross_entropy import (
    chunk_rows,
    chunked,
    precise_cross_entropy_and_grad_,
    precise_logits,
    softcap_backward_,
    softcap_forward_,
    write_grad_,
)

DistillationLoss = Callable[[Tensor, Tensor, Tensor, float | None, float, float], Tensor]


@dataclass(frozen=True)
class Kept:
    """What the student's hidden dimensions are in the teacher: index (hidden,), and 1 for each live one, else 0."""

    index: Tensor
    live: Tensor


@dataclass(frozen=True)
class DistillationTargets:
    """What a teacher makes of a micro-batch, and how the student's loss uses it.

    Attributes:
        states: what the teacher's head reads, (tokens, hidden of the teacher), every position but a row's last.
        head: the teacher's, (vocab, hidden of the teacher).
        scale, cap: of the teacher's logits, as `loss.logit_form` returns them.
        loss_and_grad_: `distillation_loss_and_grad_`, or it, compiled.
        rows: tokens of a chunk, at most (default: `cross_entropy.chunk_rows`, for both models' logits).
        hidden_weight, kept: W, and which of the teacher's hidden dimensions the student has; both or neither.
    """

    states: Tensor
    head: Tensor
    scale: float
    cap: float | None
    weight: float
    temperature: float
    loss_and_grad_: DistillationLoss
    hidden_weight: float | None = None
    kept: Kept | None = None
    rows: int | None = None

    def loss(self, h: Tensor, W: Tensor, targets: Tensor, *, scale: float, cap: float | None) -> tuple[Tensor, Tensor]:
        """Returns the loss, which has gradients, and its parts: CE, KL and, if it counts, the states' distance.

        Args:
            h: what the student's head reads, (tokens, hidden).
            W: the student's head, (vocab, hidden).
            scale, cap: of the student's logits.
        """

        def chunk_loss(logits: Tensor, at: slice, factor: float) -> Tensor:
            z = precise_logits(logits, scale)
            theirs = precise_logits(self.states[at] @ self.head.T, self.scale).to(z.dtype)
            if self.cap is not None:
                softcap_forward_(theirs, self.cap)
            sums = self.loss_and_grad_(z, theirs, targets[at], cap, self.weight, self.temperature)
            write_grad_(logits, z.mul_(scale * factor))
            return sums

        loss, parts = chunked(h, W, chunk_loss, rows=self.rows or chunk_rows(len(h), len(W), h.device.type, share=2))
        if self.kept is None or self.hidden_weight is None:
            return loss, parts
        distance = state_distance(h, self.states, self.kept)
        return loss + self.hidden_weight * distance, torch.cat([parts, distance.detach()[None]])


def distillation_loss_and_grad_(
    logits: Tensor, theirs: Tensor, targets: Tensor, cap: float | None, weight: float, temperature: float
) -> Tensor:
    """Returns the sums of loss, CE and KL over logits (n, vocab), and overwrites them with the loss's gradient.

    Args:
        logits: the student's, not soft-capped yet.
        theirs: the teacher's (n, vocab), soft-capped if it does that; used up.
    """
    tanh = None if cap is None else softcap_forward_(logits, cap)
    kl = kl_and_grad_(logits, theirs, temperature)
    ce = precise_cross_entropy_and_grad_(logits, targets, None)
    logits.lerp_(theirs, weight)
    if tanh is not None:
        softcap_backward_(logits, tanh)
    return torch.stack([(1 - weight) * ce + weight * temperature**2 * kl, ce, kl])


def kl_and_grad_(logits: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """Returns the summed KL(p ‖ q), in nats; the teacher's logits become T²·KL's gradient by the student's.

    Exactly 0, in value and gradient, where both have the same logits.
    """
    log_q = torch.log_softmax(logits / temperature, 1)
    log_p = torch.log_softmax(theirs.div_(temperature), 1)
    theirs.copy_(log_p).exp_()
    kl = log_p.sub_(log_q).mul_(theirs).sum()
    theirs.neg_().add_(log_q.exp_()).mul_(temperature)
    return kl


def state_distance(h: Tensor, states: Tensor, kept: Kept) -> Tensor:
    """Returns the mean over tokens of 1 - cos(h, the teacher's state on the dimensions that the student has).

    Both are what a final norm has put out. The student's norm divides by the size of fewer entries, so lengths differ
    where nothing else does; directions compare. Dimensions that are retired count in neither, as if they were gone.
    """
    precise = torch.promote_types(h.dtype, torch.float32)
    theirs = states.index_select(1, kept.index).to(precise) * kept.live.to(precise)
    # half the squared distance of unit vectors is 1 - cos, without its cancellation near 1
    apart = F.normalize(h.to(precise), dim=1) - F.normalize(theirs, dim=1)
    return apart.square().sum(1).mean() / 2
