"""The best scales for given codes: least squares over the few scales of each row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vllm_sparse.compress.grid import Grid, storable
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
    solvable = normal + torch.diag_embed(torch.where(empty, 1.0, 1e-6 * diagonal))
    lower, failed = torch.linalg.cholesky_ex(solvable)
    wanted = torch.where(empty, grid.scales, target).unsqueeze(-1)
    scales = storable(torch.cholesky_solve(wanted, lower).squeeze(-1), scale_dtype)
    # The error is a constant - 2 s target + s normal s of the scales s, so it needs no product with h.
    both = (scales + grid.scales).to(normal.dtype).unsqueeze(-1)
    change = ((normal @ both).squeeze(-1) - 2 * target) * (scales - grid.scales)
    worse = (failed != 0) | ~(change.sum(1) < 0) | (scales <= 0).any(1)
    scales = torch.where(worse[:, None], grid.scales, scales)
    return (codes.unflatten(1, (groups, size)) * scales.unsqueeze(-1)).flatten(1), replace(grid, scales=scales)
