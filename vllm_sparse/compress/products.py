"""Products and factors of float32 matrices. A CPU leaves them to oneDNN, twice as fast as MKL on AMD's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST = 1 << 22  # multiplications of a product that is worth the detour
_PANEL = 256  # columns that LAPACK factors at once


def _goes_to_onednn(tensor: Tensor, multiplications: int) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and multiplications >= _SMALLEST
        and torch.backends.mkldnn.is_available()
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T of ``a`` ``[m, k]`` and ``b`` ``[n, k]``, in their precision."""
    if not _goes_to_onednn(a, a.shape[0] * b.numel()):
        return a @ b.T
    return functional.linear(a.to_mkldnn(), b.to_mkldnn()).to_dense()


def product_plus(a: Tensor, b: Tensor, c: Tensor, share: float) -> Tensor:
    """Return a b^T + ``share`` c of ``c`` ``[m, n]``; see ``product``."""
    if _goes_to_onednn(a, a.shape[0] * b.numel()):
        return product(a, b).add_(c, alpha=share)
    return torch.addmm(c, a, b.T, beta=share)


def subtract_product(c: Tensor, a: Tensor, b: Tensor) -> None:
    """Subtract a^T b of ``a`` ``[k, m]`` and ``b`` ``[k, n]`` from ``c`` ``[m, n]``."""
    if _goes_to_onednn(c, a.shape[1] * b.numel()):
        c.sub_(product(a.T, b.T))
    else:
        c.addmm_(a.T, b, alpha=-1)


def cholesky(h: Tensor) -> Tensor | None:
    """Return lower L with L L^T = ``h`` ``[k, k]``, or None when ``h`` is not numerically positive definite."""
    size = len(h)
    if not _goes_to_onednn(h, size**3):
        lower, failed = torch.linalg.cholesky_ex(h)
        return None if int(failed) else lower
    rest = h.clone()
    lower = torch.zeros_like(h)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        corner, failed = torch.linalg.cholesky_ex(rest[start:stop, start:stop])
        if int(failed):
            return None
        lower[start:stop, start:stop] = corner
        if stop < size:
            below = product(rest[stop:, start:stop], inverse_of_lower(corner))
            lower[stop:, start:stop] = below
            rest[stop:, stop:] -= product(below, below)
    return lower


def inverse_of_lower(lower: Tensor) -> Tensor:
    """Return the inverse of lower triangular ``lower`` ``[k, k]``."""
    size = len(lower)
    if size <= _PANEL or not _goes_to_onednn(lower, size**3):
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = first = inverse_of_lower(lower[:half, :half])
    inverse[half:, half:] = second = inverse_of_lower(lower[half:, half:])
    inverse[half:, :half] = product(second, product(first.T, lower[half:, :half])).neg_()
    return inverse
