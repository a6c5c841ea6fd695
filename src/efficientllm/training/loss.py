"""The next-token loss in chunks: the logits of a large vocabulary never stand whole in memory.

A chunk's logits become its part of the loss and, at once, of the gradients, and are gone; so nothing is computed twice,
as it would be with checkpointing. torch's own linear_cross_entropy (2.13) does the same in float32 alone, without
soft-capped logits.

h  (tokens, hidden)  what the head reads      W  (vocab, hidden)  the head      targets  (tokens,)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import masking_utils
from transformers.modeling_outputs import CausalLMOutputWithPast

if TYPE_CHECKING:
    from efficientllm.training.distillation import Lesson

CHUNK = 2**25  # logits at once: 128 MiB in float32
PARTS, MOST_CHUNK = 8, 4 * CHUNK  # on a GPU an eighth of a pass, up to so many

Slopes = Callable[[Tensor, Tensor, float, float | None, float], Tensor]
Turn = Callable[[Tensor, slice, float], Tensor]


def chunked_loss_(model: nn.Module, slopes: Slopes | None = None) -> None:
    """Makes a decoder's forward pass with `labels` return the loss alone, computed in chunks.

    The labels are the input's own tokens, every one but the first of a row a target. Without `labels` nothing changes.
    With a `lesson` as well the loss is the lesson's, of what a teacher makes of the same tokens.

    Args:
        slopes: what turns a chunk's logits into losses and slopes (default: `token_slopes_`; or it, compiled).
    """
    stock = type(model).forward

    def forward(
        self: Any, input_ids: Tensor, labels: Tensor | None = None, lesson: "Lesson | None" = None, **more: Any
    ) -> Any:
        if labels is None:
            return stock(self, input_ids=input_ids, **more)
        with whole_rows():
            h = self.model(input_ids=input_ids, **more).last_hidden_state
        states, targets = h[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        scale, cap = logit_form(self.config)
        if lesson is not None:
            return lesson.loss(states, self.lm_head.weight, targets, scale=scale, cap=cap)
        loss = next_token_loss(states, self.lm_head.weight, targets, scale=scale, cap=cap, slopes=slopes)
        return CausalLMOutputWithPast(loss=loss)

    # a bound method, not a closure over the model: a deep copy then calls itself
    model.__dict__["forward"] = MethodType(forward, model)


def logit_form(config: Any) -> tuple[float, float | None]:
    """Returns what a model's logits are multiplied by (Granite), and what they are soft-capped at (Gemma 2)."""
    return 1 / getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None)


@contextmanager
def whole_rows() -> Iterator[None]:
    """Spares passes the question whether a row is packed of several sequences.

    transformers puts it to the device, and waits for the answer, in every pass without a mask; ours are never packed.
    """
    asked = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked


def chunk_rows(tokens: int, vocab_size: int, device: str, share: int = 1) -> int:
    """Returns the tokens of a chunk, of which `share` logits stand at once.

    Every chunk adds to the whole gradient of the head, in float32. By a count of bytes and FLOPs an H100 adds for as
    long as it computes 360 tokens: a third of the time with 2^25 logits of a vocabulary of 49,152, a tenth with 2^27.
    A CPU computes so much slower than it adds that it takes 14% longer with the larger chunks, which leave its caches.
    """
    logits = CHUNK if device == "cpu" else min(max(CHUNK, tokens * vocab_size // PARTS), MOST_CHUNK)
    return min(tokens, max(1, logits // share // vocab_size))


def next_token_loss(
    h: Tensor,
    W: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    rows: int | None = None,
    slopes: Slopes | None = None,
) -> Tensor:
    """Returns the mean cross-entropy, in nats, of cap·tanh(scale·h Wᵀ / cap) (without `cap`, of scale·h Wᵀ).

    Equals `cross_entropy(scale * h @ W.T, targets)` in float32 or above. Under autocast the products run in its dtype.

    Args:
        rows: tokens of a chunk, at most (default: `chunk_rows`).
    """
    each = slopes or token_slopes_

    def turn(logits: Tensor, at: slice, factor: float) -> Tensor:
        return each(logits, targets[at], scale, cap, factor)[None]

    return chunked(h, W, turn, rows=rows or chunk_rows(len(h), len(W), h.device.type))[0]


def chunked(h: Tensor, W: Tensor, turn: Turn, *, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the means over tokens of what `turn` sums up: the first, with its gradients by h and W, and the others.

    Args:
        turn: gets h Wᵀ of a slice of the tokens, (n, vocab), in the dtype of the products, the slice and a factor;
            overwrites them with the slopes by h Wᵀ of its first sum, times the factor.
        rows: tokens of a slice, at most.
    """
    if not torch.is_grad_enabled():  # a Function computes every gradient that its inputs could have
        h, W = h.detach(), W.detach()
    loss, others = _ChunkedLoss.apply(h, W, turn, rows)  # type: ignore[no-untyped-call]
    return loss, others


def token_slopes_(logits: Tensor, targets: Tensor, scale: float, cap: float | None, factor: float) -> Tensor:
    """Returns the summed cross-entropy of scale·logits, computed in float32, and overwrites them with its slopes.

    All in one function, so that a compiled one reads and writes the logits in their own dtype alone.
    """
    z = precise_logits(logits, scale)
    loss = loss_and_slopes_(z, targets, cap)
    put_slopes_(logits, z.mul_(scale * factor))
    return loss


def precise_logits(logits: Tensor, scale: float) -> Tensor:
    """Returns scale·logits in float32 or above; in place if they are."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if scale == 1 else z.mul_(scale)


def put_slopes_(logits: Tensor, slopes: Tensor) -> None:
    """Overwrites logits with the slopes that `precise_logits` of them have become."""
    if slopes.dtype != logits.dtype:  # else they are the same tensor
        logits.copy_(slopes)


def loss_and_slopes_(logits: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Returns the summed cross-entropy of logits (n, vocab) and overwrites them with its slope by each of them."""
    bend = None if cap is None else soft_cap_(logits, cap)
    column = targets[:, None]
    highest = logits.amax(1, keepdim=True)
    losses = highest - logits.gather(1, column)
    logits.sub_(highest).exp_()
    total = logits.sum(1, keepdim=True)
    losses += total.log()
    logits.div_(total).scatter_add_(1, column, torch.full_like(losses, -1))
    if bend is not None:
        unbend_(logits, bend)
    return losses.sum()


def soft_cap_(logits: Tensor, cap: float) -> Tensor:
    """Makes logits z into cap·tanh(z / cap) and returns the tanh."""
    bend = torch.tanh(logits.div_(cap))
    logits.copy_(bend).mul_(cap)
    return bend


def unbend_(slopes: Tensor, bend: Tensor) -> None:
    """Makes slopes by soft-capped logits into those by the logits before; uses up what `soft_cap_` has returned."""
    slopes.mul_(bend.square_().neg_().add_(1))


class _ChunkedLoss(Function):
    """Both gradients are ready when the forward pass is over; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, turn: Turn, rows: int) -> tuple[Tensor, Tensor]:
        device, precise = h.device.type, torch.promote_types(h.dtype, torch.float32)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        with torch.autocast(device, enabled=False):
            inputs, head = h.to(dtype), W.to(dtype)
            needs_h, needs_W = ctx.needs_input_grad[:2]
            grad_h = torch.empty_like(inputs) if needs_h else None
            grad_W = torch.zeros_like(W, dtype=precise) if needs_W else None
            sums = torch.zeros(1, dtype=precise, device=h.device)
            for start in range(0, len(h), rows):
                at = slice(start, start + rows)
                part = inputs[at]
                slope = part @ head.T  # logits yet
                sums = sums + turn(slope, at, 1 / len(h))
                if grad_h is not None:
                    torch.mm(slope, head, out=grad_h[at])
                if grad_W is not None and dtype == precise:
                    grad_W.addmm_(slope.T, part)
                elif grad_W is not None:
                    grad_W += slope.T @ part
        ctx.grads = grad_h, grad_W
        ctx.dtypes = h.dtype, W.dtype
        means = sums / len(h)
        loss, others = means[0].clone(), means[1:].clone()
        ctx.mark_non_differentiable(others)
        return loss, others

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> Any:
        if ctx.grads is None:
            raise RuntimeError("the chunked loss has been differentiated already; compute it again")
        grads, ctx.grads = ctx.grads, None
        grad_h, grad_W = (
            None if grad is None else grad.mul_(slope).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return grad_h, grad_W, None, None
