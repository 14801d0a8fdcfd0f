"""Calibration sequences, which may differ in length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.errors import OptionError


@dataclass(frozen=True)
class Sequences:
    """Token ids of some texts.

    They run in batches of one length each instead of padded ones. A padded position would have to be kept out of every
    H, out of the tokens that a router sends to its experts, and out of attention where it is not causal.

    Attributes:
        rows: int64 ``[length]`` each, none empty.
    """

    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, ids: Tensor | Iterable[Tensor]) -> Sequences:
        """Return the rows of ``ids``: a tensor ``[samples, length]``, or one-dimensional tensors of any lengths.

        Raises:
            OptionError: there is no sequence, or one is empty or has more dimensions.
        """
        rows = tuple(ids)
        if not rows or any(row.dim() != 1 or not row.numel() for row in rows):
            got = list(ids.shape) if isinstance(ids, Tensor) else [list(row.shape) for row in rows]
            raise OptionError(
                f"calibration tokens must be [samples, length], or a list of [length], and not empty, got {got}"
            )
        return cls(rows)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield each of them."""
        return iter(self.rows)

    def __add__(self, other: Sequences) -> Sequences:
        """Return these and ``other``'s."""
        return Sequences(self.rows + other.rows)

    @property
    def tokens(self) -> int:
        """How many tokens they have together."""
        return sum(len(row) for row in self.rows)

    @property
    def shortest(self) -> int:
        """The length of the shortest."""
        return min(len(row) for row in self.rows)

    @property
    def longest(self) -> int:
        """The length of the longest."""
        return max(len(row) for row in self.rows)

    def batches(self, tokens: int) -> list[Tensor]:
        """Return them in batches ``[rows, length]`` of at most ``tokens`` tokens, or of one row; the longest first."""
        by_length: dict[int, list[Tensor]] = {}
        for row in self.rows:
            by_length.setdefault(len(row), []).append(row)
        return [
            batch
            for length in sorted(by_length, reverse=True)
            for batch in torch.stack(by_length[length]).split(max(1, tokens // length))
        ]

    def share(self, rank: int, size: int) -> Sequences:
        """Return every ``size``-th of them, from number ``rank`` on.

        Raises:
            OptionError: there are fewer than ``size``.
        """
        if len(self) < size:
            raise OptionError(f"{len(self)} calibration sequences are too few for {size} processes")
        return Sequences(self.rows[rank::size])

    def fingerprint(self) -> str:
        """Return a hash of the token ids, so that a report says which were used."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.contiguous().numpy().tobytes())
        if self.shortest != self.longest:  # else where one ends and the next begins is known
            digest.update(str([len(row) for row in self.rows]).encode())
        return digest.hexdigest()[:16]
