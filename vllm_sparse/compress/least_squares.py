"""The best weights a mask allows: least squares on the kept entries, by conjugate gradients on all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_sparse.compress.hessian import energy
from vllm_sparse.compress.products import product


def least_squares(weight: Tensor, start: Tensor, mask: Tensor, h: Tensor, iterations: int) -> Tensor:
    """Minimise (V - W) h (V - W)^T over V that is zero outside ``mask``, row by row.

    Args:
        weight: the dense W, float ``[n, k]``.
        start: a first V on the mask, ``[n, k]``.
        mask: bool ``[n, k]``.
        h: positive definite ``[k, k]``.
        iterations: of conjugate gradients, preconditioned with the diagonal of ``h``. The error falls in every one.

    Returns:
        V, ``[n, k]``.
    """
    scale = h.diagonal().rsqrt()  # working with unit diagonal is the preconditioner
    scaled_h = h * scale[:, None] * scale
    v = start * mask / scale
    residual = product(weight / scale - v, scaled_h) * mask
    direction = residual.clone()
    norm = residual.square().sum(1, keepdim=True)
    for _ in range(iterations):
        image = product(direction, scaled_h) * mask
        step = _ratio(norm, (direction * image).sum(1, keepdim=True))
        v.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        norm, old = residual.square().sum(1, keepdim=True), norm
        direction.mul_(_ratio(norm, old)).add_(residual)
    return v * scale


def optimum_ratio(weight: Tensor, v: Tensor, mask: Tensor, h: Tensor, rows: int = 16) -> float:
    """Return the squared error of ``v`` over that of the best weights on ``mask``, on evenly spaced ``rows``.

    The best weights solve the normal equations of each row exactly; 1.0 is therefore the least possible value.
    """
    chosen = torch.linspace(0, weight.shape[0] - 1, min(rows, weight.shape[0]), device=weight.device).round().long()
    h64 = h.double()
    error = best = 0.0
    for row in chosen.tolist():
        w, kept = weight[row].double(), mask[row].nonzero().squeeze(1)
        lower = torch.linalg.cholesky(h64[kept][:, kept])
        exact = torch.zeros_like(w)
        exact[kept] = torch.cholesky_solve((h64[kept] @ w)[:, None], lower).squeeze(1)
        best += float(energy((exact - w)[None], h64))
        error += float(energy((v[row].double() - w)[None], h64))
    return error / best if best > 0 else 1.0


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is not positive: a row that is solved stops moving."""
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), 0)
