"""2:4 masks by the alternating direction method of multipliers (ALPS, Meng et al., arXiv 2406.07831)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vllm_sparse.compress.magnitude import Choose, keep_two_of_four
from vllm_sparse.compress.products import cholesky, inverse_of_lower, product, product_plus

# The penalty that ties the free weights to the pruned ones, for an H of unit diagonal, and the steps taken with each.
# It starts where the mask still moves freely and ends where it no longer does (docs/decisions/0008-compress-masks.md).
_PENALTIES = tuple(0.05 * 30 ** (stage / 7) for stage in range(8))
_STEPS = 6


def admm(weight: Tensor, h: Tensor, choose: Choose = keep_two_of_four) -> tuple[Tensor, Tensor]:
    """Choose the mask and the weights on it together, instead of one column after the other.

    Minimises (W - V) h (W - V)^T + penalty over V equal to a 2:4 matrix D, by turns: V in closed form, D by keeping the
    two largest of each group, then the multiplier that draws them together.

    Args:
        weight: the dense W, float ``[n, k]``.
        h: positive definite ``[k, k]``.
        choose: the pattern of D.

    Returns:
        D and its mask, ``[n, k]``; ``least_squares`` improves D on this mask.
    """
    scale = h.diagonal().rsqrt()
    unit = h * scale[:, None] * scale
    pruned = weight / scale
    target = product(pruned, unit)
    multiplier = torch.zeros_like(pruned)
    mask = torch.ones_like(pruned, dtype=torch.bool)
    for penalty in _PENALTIES:
        shifted = unit.clone()
        shifted.diagonal().add_(penalty)
        lower = cholesky(shifted)
        assert lower is not None  # h is positive definite
        root = inverse_of_lower(lower).T
        with _fast_products(weight.device):
            inverse = product(root, root)
            for _ in range(_STEPS):
                right = torch.add(target, pruned, alpha=penalty).sub_(multiplier)
                # V + multiplier / penalty, whose largest entries D keeps; the multiplier becomes what D leaves.
                moved = product_plus(right, inverse, multiplier, 1 / penalty)
                mask = choose(moved.abs())
                pruned = moved * mask
                multiplier = moved.sub_(pruned).mul_(penalty)
    return pruned * scale, mask


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """Let a GPU multiply in TF32: the mask does not notice, and least squares in float32 follows."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
