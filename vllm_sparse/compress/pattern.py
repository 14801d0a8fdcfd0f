"""Which entries of a weight a mask may keep: N of every M along the input features, or a share of each row."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.compress.magnitude import keep_two_of_four
from vllm_sparse.errors import NotSparseError, OptionError
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight, nonzero_mask

_LARGEST_GROUP = 32


@dataclass(frozen=True)
class Pattern:
    """A rule for masks. ``parse`` makes it of what a user writes.

    Attributes:
        text: "2:4" keeps two of every four; "0.7" keeps what is left after 70 % of the entries were pruned.
        kept, size: N and M; 0 for a share of a row.
        pruned: the share of entries that are zero.
    """

    text: str
    kept: int
    size: int
    pruned: float

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern; raise OptionError if it is none."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found:
            kept, size = int(found[1]), int(found[2])
            if size % 4 == 0 and 4 <= size <= _LARGEST_GROUP and size & (size - 1) == 0 and 0 < kept < size:
                return cls(text, kept, size, 1 - kept / size)
        elif re.fullmatch(r"0?\.\d+", text) and float(text) > 0:
            return cls(text, 0, 0, float(text))
        raise OptionError(
            f"unknown pattern {text!r}: expected N:M, N kept of every M = 4, 8, 16 or {_LARGEST_GROUP}, such as 2:4, "
            f"or the share of zeros, such as 0.5"
        )

    @property
    def two_of_four(self) -> bool:
        """Whether every weight of this pattern is 2:4."""
        return self.size == 4 and self.kept <= 2

    @property
    def columns(self) -> int:
        """How many input features a mask is chosen over at once, or 0 where that is free."""
        return self.size

    def mask(self, scores: Tensor) -> Tensor:
        """Return the mask ``[n, k]`` that keeps the highest ``scores``; of equal ones the first, on every device."""
        if (self.kept, self.size) == (2, 4):
            return keep_two_of_four(scores)
        groups = scores.unflatten(-1, (-1, self.size)) if self.size else scores
        count = self.kept if self.size else scores.shape[-1] - self.pruned_of(scores.shape[-1])
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., :count]
        keep = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device).scatter_(-1, best, True)
        return keep.view(scores.shape)

    def mask_of_block(self, scores: Tensor) -> Tensor:
        """Return the mask of some columns of all rows ``[n, c]``, where a share may differ from row to row."""
        return self.mask(scores) if self.size else self.mask(scores.reshape(1, -1)).view(scores.shape)

    def pruned_of(self, count: int) -> int:
        """Return how many of ``count`` entries a share prunes."""
        return -int(-self.pruned * count // 1)  # rounded up: never less than was asked for

    def violations(self, dense: Tensor) -> int:
        """Return how many groups of ``dense`` ``[n, k]`` hold more non-zeros than the pattern keeps; 0 for a share."""
        if not self.size:
            return 0
        kept = nonzero_mask(dense).unflatten(-1, (-1, self.size)).sum(-1, dtype=torch.int16)
        return int((kept > self.kept).sum())

    def check(self, weight: Tensor, layer: str) -> None:
        """Raise NotSparseError naming ``layer`` unless ``weight`` ``[n, k]`` is of this pattern."""
        if (self.kept, self.size) == (2, 4):
            Sparse24Weight.from_dense(weight.bfloat16(), SCHEMES["bf16"], layer=layer)
        elif bad := self.violations(weight):
            groups = weight.numel() // self.size
            raise NotSparseError(f"{layer}: {bad} of {groups} groups have more than {self.kept} non-zeros")


TWO_OF_FOUR = Pattern.parse("2:4")
