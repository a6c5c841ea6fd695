"""The second-order weight update of variant B (method.md section 6): consumers absorb the in-channels that go.

W  (out, in)   a consumer's weight          X  (rows, in)  its inputs on the current batch
P              in-channels that go          K              in-channels that stay
H  = XᵀX + damp·mean(diag XᵀX)·I            Z  = H⁻¹ E_P, one solve for all of P
"""

import torch
from torch import Tensor

DAMP = 1e-2  # of the mean diagonal (SparseGPT, ZipLM)


def damped_gram(X: Tensor, damp: float = DAMP) -> Tensor:
    """Returns H (in, in) in at least float32; its damping's mean runs over in-channels that are not all zero."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    H = X.T @ X
    diagonal = H.diagonal()
    live = diagonal > 0
    mean = diagonal.sum() / live.sum().clamp(min=1)
    diagonal += damp * mean + torch.finfo(H.dtype).tiny
    return H


def absorb(W: Tensor, H: Tensor, removed: Tensor) -> Tensor:
    """Returns W with its columns P zero and the others moved to least error: W - W_P (Z_P)⁻¹ Zᵀ.

    Equals the damped least squares of the old outputs on the kept inputs, W_K + W_P H_PK H_KK⁻¹.
    """
    return _absorb(W, _solve(H, removed), removed)


def absorb_all(weights: list[Tensor], X: Tensor, removed: Tensor) -> list[Tensor]:
    """Returns the updated weights of consumers that read the same inputs X, from one factorisation."""
    with torch.autocast(X.device.type, enabled=False):
        Z = _solve(damped_gram(X), removed)
        return [_absorb(W, Z, removed) for W in weights]


def _solve(H: Tensor, removed: Tensor) -> Tensor:
    """Returns Z (in, |P|) with H Z = E_P, by Cholesky; the inverse is never formed."""
    E = torch.zeros(H.shape[0], len(removed), dtype=H.dtype, device=H.device)
    E[removed, torch.arange(len(removed), device=H.device)] = 1
    factor, info = torch.linalg.cholesky_ex(H)
    if int(info):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "the layer's inputs give no positive definite Hessian"
        )
    return torch.cholesky_solve(E, factor)


def _absorb(W: Tensor, Z: Tensor, removed: Tensor) -> Tensor:
    precise = W.to(Z.dtype)
    updated = precise - precise[:, removed] @ torch.linalg.solve(Z[removed], Z.T)
    updated[:, removed] = 0
    result: Tensor = updated.to(W.dtype)
    return result
