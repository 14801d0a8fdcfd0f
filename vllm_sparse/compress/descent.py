"""Coordinate descent on a rounded weight (QuantEase, arXiv 2309.01885), restricted to the kept entries."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_sparse.compress.grid import Grid, fused_block, fused_columns
from vllm_sparse.compress.products import product, subtract_product


def coordinate_descent(
    weight: Tensor, rounded: Tensor, h: Tensor, grid: Grid, mask: Tensor, sweeps: int, block: int = 128
) -> Tensor:
    """Round each kept entry again, given all others, to what makes (W - Q) h (W - Q)^T least.

    GPTQ decides a column before it knows the later ones, and spends corrections on entries that the mask then throws
    away. Here every column is decided with all others in place, so the error never grows.

    Args:
        weight: what ``rounded`` approximates, float ``[n, k]``.
        rounded: on ``grid`` and zero outside ``mask``, ``[n, k]``; not modified.
        h: symmetric, positive definite ``[k, k]``.
        sweeps: passes over all columns.
        block: columns whose changes reach the rest in one product; changes the speed and not the result.

    Returns:
        The improved weight, on the same grid and mask.
    """
    k, block = weight.shape[1], fused_block(weight, block)
    q, keep = rounded.T.contiguous(), mask.T.contiguous()
    gradient = product(h, weight - rounded)
    for start in [*range(0, k, block)] * sweeps:
        stop = min(start + block, k)
        own = slice(start, stop)
        change = _decide_columns(q[own], gradient[own], keep[own], h[own, own], grid, start)
        subtract_product(gradient, h[own], change)
    return q.T.contiguous()


def _decide_columns(q: Tensor, gradient: Tensor, keep: Tensor, h: Tensor, grid: Grid, start: int) -> Tensor:
    """Improve ``q`` ``[block, n]`` in place, its first column being ``start`` of the weight; return the changes."""
    if (fused := fused_columns(q)) is not None:
        scales = grid.transposed_scales(torch.arange(start, start + len(q), device=q.device))
        return fused.descent_columns(q, gradient, keep, scales, h, grid.scheme)
    old, slope, diagonal = q.clone(), gradient.clone(), h.diagonal()
    for j in range(len(q)):
        best = grid.round(q[j] + slope[j] / diagonal[j], start + j) * keep[j]
        slope.addr_(h[:, j], best - q[j], alpha=-1)
        q[j] = best
    return q - old
