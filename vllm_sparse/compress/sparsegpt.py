"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774), alone or with quantization in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_sparse.compress.grid import Grid, fused_block, fused_columns
from vllm_sparse.compress.pattern import TWO_OF_FOUR, Pattern
from vllm_sparse.compress.products import subtract_product


def sparsegpt(
    weight: Tensor, factor: Tensor, grid: Grid | None = None, block: int = 128, pattern: Pattern = TWO_OF_FOUR
) -> tuple[Tensor, Tensor]:
    """Prune ``weight`` to ``pattern``, moving the error of each column onto the columns after it.

    Args:
        weight: float ``[n, k]``; not modified.
        factor: ``Damped.factor`` of the inputs, ``[k, k]``.
        grid: rounds each kept weight as it is reached (the joint mode, section 3.4 of the paper).
        block: columns whose errors are applied to the rest in one product, a multiple of M. It changes the speed and
            not the result, since the mask of N:M is chosen M columns at a time; for a share, the block's at once.

    Returns:
        The pruned (and rounded) weight and its mask, both ``[n, k]``.
    """
    k = weight.shape[1]
    # Column j of the weight is row j here, so that the inner loop touches contiguous memory.
    w = weight.T.clone(memory_format=torch.contiguous_format)
    keep = torch.empty_like(w, dtype=torch.bool)
    block = fused_block(w, block)
    for start in range(0, k, block):
        stop = min(start + block, k)
        own = slice(start, stop)
        errors = _prune_columns(w[own], keep[own], factor[own, own], grid, start, pattern)
        subtract_product(w[stop:], factor[own, stop:], errors)
    return w.T.contiguous(), keep.T.contiguous()


def _prune_columns(
    w: Tensor, keep: Tensor, factor: Tensor, grid: Grid | None, start: int, pattern: Pattern = TWO_OF_FOUR
) -> Tensor:
    """Prune ``w`` ``[block, n]`` in place and fill ``keep``; return the errors of the columns."""
    if pattern == TWO_OF_FOUR and (fused := fused_columns(w)) is not None:
        if grid is None:
            return fused.sparsegpt_columns(w, keep, factor)
        columns = torch.arange(start, start + len(w), device=w.device)
        return fused.sparsegpt_columns(w, keep, factor, grid.transposed_scales(columns), grid.scheme)
    errors, diagonal = torch.empty_like(w), factor.diagonal()
    together = pattern.columns or len(w)
    for j in range(len(w)):
        if j % together == 0:  # what is left of each weight after the columns before it, over the cost of losing it
            group = slice(j, j + together)
            keep[group] = pattern.mask_of_block((w[group] / diagonal[group, None]).square().T).T
        target = w[j] * keep[j]
        if grid is not None:
            target = grid.round(target, start + j)
        errors[j] = (w[j] - target) / diagonal[j]
        w[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        w[j] = target
    return errors
