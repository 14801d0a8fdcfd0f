"""2:4 masks by the alternating direction method of multipliers (ALPS, Meng et al., arXiv 2406.07831)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vllm_sparse.compress.gptq import round_to_nearest
from vllm_sparse.compress.grid import Grid
from vllm_sparse.compress.magnitude import Choose, keep_two_of_four

# The penalty that ties the free weights to the pruned ones, for an H of unit diagonal, and the steps taken with each.
# It starts where the mask still moves freely and ends where it no longer does (docs/decisions/0008-compress-masks.md).
_PENALTIES = tuple(0.05 * 30 ** (stage / 7) for stage in range(8))
_STEPS = 6
_GRID_PENALTIES = (0.35, 0.6, 0.9, 1.5, 3.0)
_GRID_STEPS = 10
_Project = Callable[[Tensor], tuple[Tensor, Tensor]]


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

    def project(moved: Tensor) -> tuple[Tensor, Tensor]:
        mask = choose(moved.abs())
        return moved * mask, mask

    pruned, mask = _alternate(weight / scale, h * scale[:, None] * scale, weight / scale, project, _PENALTIES, _STEPS)
    return pruned * scale, mask


def admm_on_grid(weight: Tensor, start: Tensor, h: Tensor, grid: Grid, choose: Choose) -> tuple[Tensor, Tensor]:
    """Do the same with D on ``grid`` as well: of every group, those stay whose codes take the most off the error.

    Args:
        start: a pruned weight near the result, ``[n, k]``.

    Returns:
        D, rounded, and its mask, ``[n, k]``.
    """
    scale = h.diagonal().rsqrt()

    def project(moved: Tensor) -> tuple[Tensor, Tensor]:
        rounded = round_to_nearest(moved * scale, grid) / scale
        mask = choose(moved.square() - (moved - rounded).square())
        return rounded * mask, mask

    first, _ = project(start / scale)
    unit = h * scale[:, None] * scale
    pruned, mask = _alternate(weight / scale, unit, first, project, _GRID_PENALTIES, _GRID_STEPS)
    return round_to_nearest(pruned * scale, grid), mask


def _alternate(
    weight: Tensor, unit: Tensor, pruned: Tensor, project: _Project, penalties: Sequence[float], steps: int
) -> tuple[Tensor, Tensor]:
    """Take turns between the free weights, near ``pruned``, and the nearest ones that ``project`` allows."""
    target = weight @ unit
    multiplier = torch.zeros_like(weight)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for penalty in penalties:
        shifted = unit.clone()
        shifted.diagonal().add_(penalty)
        root = _inverse_triangle(torch.linalg.cholesky(shifted))
        with _fast_products(weight.device):
            inverse = root.T @ root
            for _ in range(steps):
                right = torch.add(target, pruned, alpha=penalty).sub_(multiplier)
                # V + multiplier / penalty, which D is made of; the multiplier becomes what D leaves.
                moved = torch.addmm(multiplier, right, inverse, beta=1 / penalty)
                pruned, mask = project(moved)
                multiplier = moved.sub_(pruned).mul_(penalty)
    return pruned, mask


def _inverse_triangle(lower: Tensor) -> Tensor:
    """Return the inverse of lower triangular ``lower`` ``[k, k]``."""
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False)


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
