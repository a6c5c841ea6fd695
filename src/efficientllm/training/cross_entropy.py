"""The arithmetic of the chunked loss: a chunk's logits become its part of the loss and, at once, of the gradients.

So the logits of a large vocabulary are never whole in memory, and nothing is computed twice, as it would be with
checkpointing. torch's own linear_cross_entropy (2.13) does the same in float32 alone, without soft-capped logits.

h  (tokens, hidden)  what the head reads      W  (vocab, hidden)  the head      targets  (tokens,)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

CHUNK = 2**25  # logits at once: 128 MiB in float32
PARTS, MOST_CHUNK = 8, 4 * CHUNK  # on a GPU an eighth of a pass, up to this many

CrossEntropy = Callable[[Tensor, Tensor, float, float | None, float], Tensor]  # as cross_entropy_and_grad_
ChunkLoss = Callable[[Tensor, slice, float], Tensor]


def chunk_rows(tokens: int, vocab_size: int, device: str, share: int = 1) -> int:
    """Returns the tokens of a chunk, of which `share` logits are in memory at once.

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
    cross_entropy_: CrossEntropy | None = None,
) -> Tensor:
    """Returns the mean cross-entropy, in nats, of cap·tanh(scale·h Wᵀ / cap) (without `cap`, of scale·h Wᵀ).

    Equals `cross_entropy(scale * h @ W.T, targets)` in float32 or above. Under autocast the products run in its dtype.

    Args:
        rows: tokens of a chunk, at most (default: `chunk_rows`).
        cross_entropy_: `cross_entropy_and_grad_` (default), or it, compiled.
    """
    compute_ = cross_entropy_ or cross_entropy_and_grad_

    def chunk_loss(logits: Tensor, at: slice, factor: float) -> Tensor:
        return compute_(logits, targets[at], scale, cap, factor)[None]

    return chunked(h, W, chunk_loss, rows=rows or chunk_rows(len(h), len(W), h.device.type))[0]


def chunked(h: Tensor, W: Tensor, chunk_loss: ChunkLoss, *, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the means over tokens of the sums of `chunk_loss`: the first, differentiable by h and W, and the others.

    Args:
        chunk_loss: gets h Wᵀ of a slice of the tokens, (n, vocab), in the dtype of the products, the slice and a
            factor; overwrites them with the gradient of its first sum by h Wᵀ, times the factor.
        rows: tokens of a slice, at most.
    """
    if not torch.is_grad_enabled():  # a Function computes every gradient that its inputs could have
        h, W = h.detach(), W.detach()
    loss, others = _ChunkedLoss.apply(h, W, chunk_loss, rows)  # type: ignore[no-untyped-call]
    return loss, others


def cross_entropy_and_grad_(logits: Tensor, targets: Tensor, scale: float, cap: float | None, factor: float) -> Tensor:
    """Returns the summed cross-entropy of scale·logits, computed in float32, and overwrites them with its gradient.

    All in one function, so that a compiled one reads and writes the logits in their own dtype alone.
    """
    z = precise_logits(logits, scale)
    loss = precise_cross_entropy_and_grad_(z, targets, cap)
    write_grad_(logits, z.mul_(scale * factor))
    return loss


def precise_logits(logits: Tensor, scale: float) -> Tensor:
    """Returns scale·logits in float32 or above; in place if they are."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if scale == 1 else z.mul_(scale)


def write_grad_(logits: Tensor, grad: Tensor) -> None:
    """Overwrites logits with the gradient that `precise_logits` of them have become."""
    if grad.dtype != logits.dtype:  # else they are the same tensor
        logits.copy_(grad)


def precise_cross_entropy_and_grad_(logits: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Returns the summed cross-entropy of logits (n, vocab) in float32 or above, which become its gradient."""
    tanh = None if cap is None else softcap_forward_(logits, cap)
    column = targets[:, None]
    highest = logits.amax(1, keepdim=True)
    losses = highest - logits.gather(1, column)
    logits.sub_(highest).exp_()
    total = logits.sum(1, keepdim=True)
    losses += total.log()
    logits.div_(total).scatter_add_(1, column, torch.full_like(losses, -1))
    if tanh is not None:
        softcap_backward_(logits, tanh)
    return losses.sum()


def softcap_forward_(logits: Tensor, cap: float) -> Tensor:
    """Makes logits z into cap·tanh(z / cap) and returns the tanh."""
    tanh = torch.tanh(logits.div_(cap))
    logits.copy_(tanh).mul_(cap)
    return tanh


def softcap_backward_(grad: Tensor, tanh: Tensor) -> None:
    """Makes a gradient by soft-capped logits into that by the logits before; overwrites the tanh."""
    grad.mul_(tanh.square_().neg_().add_(1))


class _ChunkedLoss(Function):
    """Both gradients are ready when the forward pass is over; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, chunk_loss: ChunkLoss, rows: int) -> tuple[Tensor, Tensor]:
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
                grad = part @ head.T  # logits yet
                sums = sums + chunk_loss(grad, at, 1 / len(h))
                if grad_h is not None:
                    torch.mm(grad, head, out=grad_h[at])
                if grad_W is not None and dtype == precise:
                    grad_W.addmm_(grad.T, part)
                elif grad_W is not None:
                    grad_W += grad.T @ part
        ctx.grads = grad_h, grad_W
        ctx.dtypes = h.dtype, W.dtype
        means = sums / len(h)
        loss, others = means[0].clone(), means[1:].clone()
        ctx.mark_non_differentiable(others)
        return loss, others

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> Any:
        if ctx.grads is None:
            raise RuntimeError("the chunked loss has been differentiated already; compute it again")
        grads, ctx.grads = ctx.grads, None
        grad_h, grad_W = (
            None if grad is None else grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return grad_h, grad_W, None, None
