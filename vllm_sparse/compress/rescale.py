"""The best scales for given codes: least squares over the few scales of each row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vllm_sparse.compress.grid import Grid, storable
from vllm_sparse.compress.hessian import energy
from vllm_sparse.compress.products import product


def refit_scales(
    weight: Tensor, rounded: Tensor, h: Tensor, grid: Grid, scale_dtype: torch.dtype
) -> tuple[Tensor, Grid]:
    """Minimise (W - S C) h (W - S C)^T over the scales S of ``rounded`` = S C, row by row; the codes C stay.

    Args:
        weight: what is approximated, float32 ``[n, k]``.
        rounded: on ``grid``, ``[n, k]``.
        h: positive definite ``[k, k]``.
        scale_dtype: what scales are stored in. A row that rounding them to it would make worse keeps its own.

    Returns:
        The codes with the new scales ``[n, k]``, and the new grid.
    """
    groups = grid.scales.shape[1]
    codes = grid.encode(rounded).to(weight.dtype)
    size = weight.shape[1] // groups
    target = (product(weight, h) * codes).unflatten(1, (groups, size)).sum(-1)
    normal = torch.empty(len(weight), groups, groups, dtype=weight.dtype, device=weight.device)
    for g in range(groups):
        own = slice(g * size, (g + 1) * size)
        normal[:, g] = (product(codes[:, own], h[:, own]) * codes).unflatten(1, (groups, size)).sum(-1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # a group whose codes are all zero keeps its scale
    diagonal += torch.where(empty, 1.0, 1e-6 * diagonal)
    target = torch.where(empty, grid.scales, target)
    lower, failed = torch.linalg.cholesky_ex(normal)
    scales = storable(torch.cholesky_solve(target.unsqueeze(-1), lower).squeeze(-1), scale_dtype)
    new = (codes.unflatten(1, (groups, size)) * scales.unsqueeze(-1)).flatten(1)
    worse = (failed != 0) | ~(energy(weight - new, h) < energy(weight - rounded, h)) | (scales <= 0).any(1)
    scales = torch.where(worse[:, None], grid.scales, scales)
    return torch.where(worse[:, None], rounded, new), replace(grid, scales=scales)
