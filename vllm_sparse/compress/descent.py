"""Coordinate descent on a rounded weight (QuantEase, arXiv 2309.01885), restricted to the kept entries."""

from __future__ import annotations

from torch import Tensor

from vllm_sparse.compress.grid import Grid


def coordinate_descent(
    weight: Tensor, rounded: Tensor, h: Tensor, grid: Grid, mask: Tensor, sweeps: int, block: int = 128
) -> Tensor:
    """Round each kept entry again, given all others, to what makes (W - Q) h (W - Q)^T least.

    GPTQ decides a column before it knows the later ones, and spends corrections on entries that the mask then throws
    away. Here every column is decided with all others in place, so the error never grows.

    Args:
        weight: what ``rounded`` approximates, float ``[n, k]``.
        rounded: on ``grid`` and zero outside ``mask``, ``[n, k]``; not modified.
        h: positive definite ``[k, k]``.
        sweeps: passes over all columns.
        block: columns whose changes reach the rest in one product; changes the speed and not the result.

    Returns:
        The improved weight, on the same grid and mask.
    """
    k = weight.shape[1]
    q, keep = rounded.T.contiguous(), mask.T.contiguous()
    gradient = h @ (weight - rounded).T
    diagonal = h.diagonal()
    for start in [*range(0, k, block)] * sweeps:
        stop = min(start + block, k)
        old = q[start:stop].clone()
        for j in range(start, stop):
            best = grid.round(q[j] + gradient[j] / diagonal[j], j) * keep[j]
            gradient[start:stop].addr_(h[start:stop, j], best - q[j], alpha=-1)
            q[j] = best
        change = q[start:stop] - old
        gradient[:start].addmm_(h[:start, start:stop], change, alpha=-1)
        gradient[stop:].addmm_(h[stop:, start:stop], change, alpha=-1)
    return q.T.contiguous()
