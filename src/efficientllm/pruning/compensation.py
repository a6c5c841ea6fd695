"""The second-order weight update of variant B (docs/method.md section 6): consumers absorb the in-channels that go.

W  (out, in)   a consumer's weight          X  (rows, in)  its inputs on the current batch
P              in-channels that go          K              in-channels that stay
H  = XᵀX + λI,  λ = damp·mean(diag XᵀX)     Z  = H⁻¹ E_P ((H⁻¹)_PP)⁻¹: identity at P, -H_KK⁻¹ H_KP at K

Nothing here waits for the device: where H is not positive definite, Z is NaN.
"""

import torch
from torch import Tensor

DAMP = 1e-2  # of the mean diagonal (SparseGPT, ZipLM)


def gram(X: Tensor) -> Tensor:
    """Returns XᵀX (in, in) in at least float32."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    return X.T @ X


def damped_(H: Tensor) -> Tensor:
    """Adds the damping to XᵀX in place and returns it; its mean runs over in-channels that are not all zero."""
    diagonal = H.diagonal()
    diagonal += damping(diagonal)
    return H


def damping(diagonal: Tensor) -> Tensor:
    """Returns λ by the diagonal of XᵀX."""
    live = diagonal > 0
    return DAMP * diagonal.sum() / live.sum().clamp(min=1) + torch.finfo(diagonal.dtype).tiny


def solve(H: Tensor, removed: Tensor) -> Tensor:
    """Returns Z (in, |P|), by Cholesky; the inverse is never formed."""
    E = torch.zeros(H.shape[0], len(removed), dtype=H.dtype, device=H.device)
    E[removed, torch.arange(len(removed), device=H.device)] = 1
    columns = torch.cholesky_solve(E, _factor(H))
    scaled: Tensor = torch.linalg.solve_ex(columns[removed], columns.T)[0]
    return scaled.T


def solve_by_rows(X: Tensor, removed: Tensor) -> Tensor:
    """Returns Z (in, |P|) with a factor of rows² instead of in².

    What absorbs P are the coefficients of a ridge regression of X_P on X_K, so
    H_KK⁻¹ H_KP = X_Kᵀ (X_K X_Kᵀ + λI)⁻¹ X_P: less work where X has fewer rows than columns, and no difference is taken.
    """
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    kept = X.index_fill(1, removed, 0)
    inner = kept @ kept.T
    inner.diagonal().add_(damping(X.square().sum(0)))
    Z = kept.T @ torch.cholesky_solve(X[:, removed].neg(), _factor(inner))
    Z[removed, torch.arange(len(removed), device=X.device)] = 1
    return Z


def _factor(H: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(H)
    return factor.masked_fill_(info != 0, torch.nan)


def update(W: Tensor, Z: Tensor, removed: Tensor) -> Tensor:
    """Returns W, or some rows of it, with its columns P zero and the others moved to least error: W - W_P Zᵀ.

    Equals the damped least squares of the old outputs on the kept inputs, W_K + W_P H_PK H_KK⁻¹.
    """
    precise = W.to(Z.dtype)
    updated = precise - precise[:, removed] @ Z.T
    return updated.index_fill_(1, removed, 0).to(W.dtype)
