"""2:4 masks from scores: magnitude (|w|) and Wanda (|w| times the norm of the input, arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor


def keep_two_of_four(scores: Tensor) -> Tensor:
    """Return the mask ``[n, k]`` that keeps the two highest ``scores`` of every aligned group of four.

    Of equal scores the one with the lower position is kept, on every device.
    """
    groups = scores.unflatten(-1, (-1, 4))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < 2).flatten(-2)


def magnitude_mask(weight: Tensor) -> Tensor:
    """Return the mask of the two largest magnitudes of every group of four of ``weight`` ``[n, k]``."""
    return keep_two_of_four(weight.abs())


def wanda_mask(weight: Tensor, h: Tensor) -> Tensor:
    """Return the mask of the two largest |w| * ||x|| of every group, from ``weight`` ``[n, k]`` and H ``[k, k]``."""
    return keep_two_of_four(weight.abs() * h.diagonal().clamp_min(0).sqrt())
