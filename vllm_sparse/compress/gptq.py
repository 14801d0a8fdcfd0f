"""GPTQ (Frantar et al., arXiv 2210.17323) that keeps a given 2:4 mask, and plain rounding to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_sparse.compress.grid import Grid, fused_block, fused_columns
from vllm_sparse.compress.hessian import damp
from vllm_sparse.compress.products import subtract_product


def round_to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Return ``weight`` ``[n, k]`` with every entry rounded to ``grid``; zeros stay zero."""
    scales = grid.scales.unsqueeze(-1)
    return (grid.encode(weight).to(weight.dtype).unflatten(1, (grid.scales.shape[1], -1)) * scales).flatten(1)


def gptq(weight: Tensor, h: Tensor, grid: Grid, mask: Tensor, act_order: bool = True, block: int = 128) -> Tensor:
    """Round ``weight`` to ``grid`` column by column, moving each column's error onto the columns not yet rounded.

    A pruned entry is rounded to zero whatever error has reached it, and what it had gained moves on like a rounding
    error. The mask therefore survives, which plain GPTQ after pruning does not give.

    Args:
        weight: float ``[n, k]``, zero outside ``mask``; not modified.
        h: positive definite ``[k, k]`` (``Damped.h``).
        grid: scales, taken from ``weight`` as it is now.
        mask: bool ``[n, k]``, the entries that may be non-zero.
        act_order: visit the inputs with the largest second moment first. Scales stay where they are (static groups).
        block: columns whose errors are applied to the rest in one product; changes the speed and not the result.

    Returns:
        The rounded weight ``[n, k]``.
    """
    k = weight.shape[1]
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(k, device=h.device)
    factor = damp(h[order][:, order], 0.0).factor
    w = weight.T[order].contiguous()
    keep = mask.T[order].contiguous()
    block = fused_block(w, block)
    for start in range(0, k, block):
        stop = min(start + block, k)
        part = factor[start:stop, start:stop]
        errors = _round_columns(w[start:stop], keep[start:stop], part, grid, order[start:stop])
        subtract_product(w[stop:], factor[start:stop, stop:], errors)
    result = torch.empty_like(w)
    result[order] = w
    return result.T.contiguous()


def _round_columns(w: Tensor, keep: Tensor, factor: Tensor, grid: Grid, columns: Tensor) -> Tensor:
    """Round ``w`` ``[block, n]`` in place; return the errors of its columns, which are ``columns`` of the grid."""
    if (fused := fused_columns(w)) is not None:
        return fused.gptq_columns(w, keep, grid.transposed_scales(columns), factor, grid.scheme)
    errors, diagonal = torch.empty_like(w), factor.diagonal()
    for j, column in enumerate(columns.tolist()):
        target = grid.round(w[j], column) * keep[j]
        errors[j] = (w[j] - target) / diagonal[j]
        w[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        w[j] = target
    return errors
