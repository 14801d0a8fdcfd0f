"""Masks from scores: magnitude (|w|) and Wanda (|w| times the norm of the input, arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[Tensor], Tensor]  # from scores to a mask, both [n, k]


def keep_two_of_four(scores: Tensor) -> Tensor:
    """Return the mask ``[n, k]`` that keeps the two highest ``scores`` of every aligned group of four.

    Of equal scores the one with the lower position is kept, on every device.
    """
    a, b, c, d = scores.unflatten(-1, (-1, 4)).unbind(-1)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    entries = keep.unflatten(-1, (-1, 4))
    # Kept is what wins two of its three comparisons.
    for i, (x, y, z) in enumerate(((ab, ac, ad), (~ab, bc, bd), (~ac, ~bc, cd), (~ad, ~bd, ~cd))):
        entries[..., i] = (x & y) | (x & z) | (y & z)
    return keep


def magnitude_mask(weight: Tensor, choose: Choose = keep_two_of_four) -> Tensor:
    """Return the mask of the largest magnitudes of ``weight`` ``[n, k]``."""
    return choose(weight.abs())


def wanda_mask(weight: Tensor, h: Tensor, choose: Choose = keep_two_of_four) -> Tensor:
    """Return the mask of the largest |w| * ||x||, from ``weight`` ``[n, k]`` and H ``[k, k]``."""
    return choose(weight.abs() * h.diagonal().clamp_min(0).sqrt())
