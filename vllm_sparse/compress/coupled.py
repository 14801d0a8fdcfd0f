"""A layer whose outputs matter together: tr(G D H D^T), with D the error of the weights, instead of D H D^T by rows.

G says what errors of the outputs cost the model (curvature.py): an error of one row can be made good in another, and
what nothing reads may be wrong.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vllm_sparse.compress.descent import coordinate_descent
from vllm_sparse.compress.grid import Grid
from vllm_sparse.compress.rescale import refit_scales

# docs/decisions/0015-compress-outputs-together.md
_DAMPENING = 0.1  # share of G's mean diagonal added to it; 0.01 and 0.001 are worse
_ITERATIONS = 30
_ROW_BLOCKS = 8  # rows a multiple of this apart, which belong to one head or the like, are rounded in turn
_SWEEPS = 2


def damp_outputs(g: Tensor) -> Tensor:
    """Return ``g`` ``[n, n]`` made positive definite."""
    damped = g.clone()
    damped.diagonal().add_(_DAMPENING * float(g.diagonal().mean()) or 1.0)
    return damped


def coupled_error(difference: Tensor, h: Tensor, g: Tensor) -> float:
    """Return tr(g D h D^T) of ``difference`` D ``[n, k]``."""
    return float(((g @ (difference @ h)) * difference).sum())


def coupled_least_squares(weight: Tensor, start: Tensor, mask: Tensor, h: Tensor, g: Tensor) -> Tensor:
    """Minimise tr(g (V - W) h (V - W)^T) over V that is zero outside ``mask``.

    Args:
        weight: the dense W, float ``[n, k]``.
        start: a first V on the mask, ``[n, k]``.
        mask: bool ``[n, k]``.
        h: positive definite ``[k, k]``; g: positive definite ``[n, n]``.

    Returns:
        V, ``[n, k]``, after conjugate gradients preconditioned with both diagonals.
    """
    scale = g.diagonal().rsqrt()[:, None] * h.diagonal().rsqrt()
    unit_h = h * h.diagonal().rsqrt()[:, None] * h.diagonal().rsqrt()
    unit_g = g * g.diagonal().rsqrt()[:, None] * g.diagonal().rsqrt()
    v = start * mask / scale
    residual = (unit_g @ ((weight / scale - v) @ unit_h)) * mask
    direction, norm = residual.clone(), residual.square().sum()
    for _ in range(_ITERATIONS):
        image = (unit_g @ (direction @ unit_h)) * mask
        step = norm / (direction * image).sum().clamp_min(torch.finfo(norm.dtype).tiny)
        v += step * direction
        residual -= step * image
        norm, old = residual.square().sum(), norm
        direction.mul_(norm / old.clamp_min(torch.finfo(norm.dtype).tiny)).add_(residual)
    return v * scale


def row_targets(weight: Tensor, v: Tensor, g: Tensor, rows: slice = slice(None)) -> Tensor:
    """Return what each of ``rows`` of ``v`` should be, dense and unrounded, given the errors of all other rows."""
    return v[rows] - (g[rows] @ (v - weight)) / g.diagonal()[rows, None]


def round_coupled(
    weight: Tensor, rounded: Tensor, mask: Tensor, h: Tensor, g: Tensor, grid: Grid, scale_dtype: torch.dtype
) -> tuple[Tensor, Grid]:
    """Decide codes and scales again, some rows at a time, with the errors of all others in view.

    Args:
        weight: the dense W, ``[n, k]``.
        rounded: on ``grid`` and zero outside ``mask``, ``[n, k]``.

    Returns:
        The best of what was found, ``rounded`` included, and its grid.
    """
    best, least = (rounded, grid), coupled_error(rounded - weight, h, g)
    q, scales = rounded.clone(), grid.scales.clone()
    for _ in range(_SWEEPS):
        for first in range(_ROW_BLOCKS):
            rows = slice(first, None, _ROW_BLOCKS)
            if not len(q[rows]):
                continue
            target, own = row_targets(weight, q, g, rows), replace(grid, scales=scales[rows].contiguous())
            new = coordinate_descent(target, q[rows].contiguous(), h, own, mask[rows].contiguous(), 1)
            q[rows], own = refit_scales(target, new, h, own, scale_dtype)
            scales[rows] = own.scales
        if (error := coupled_error(q - weight, h, g)) < least:
            best, least = (q.clone(), replace(grid, scales=scales.clone())), error
    return best
