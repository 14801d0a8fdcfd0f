"""What every checkpoint format answers: which tensors a layer has on disk, and the hub weight they make."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_sparse.scheme import Scheme
from vllm_sparse.weight import Sparse24Weight


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a linear layer on disk, as a loader needs it.

    Attributes:
        name: the last part of the tensor's name; the rest is the module's.
        shape, dtype: for the layer (or the shard of it) that was asked for.
        output_dim, input_dim: the dimension along which output (input) features lie, or None.
        per_part: True for a scalar of each fused part (q, k, v), kept one per part until ``to_weight``.
        optional: True if a checkpoint may leave it out.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    output_dim: int | None = 0
    input_dim: int | None = None
    per_part: bool = False
    optional: bool = False


class Format(ABC):
    """A published checkpoint format, configured by one checkpoint's ``quantization_config``.

    Attributes:
        name: the word used in logs and docs/formats.md.
        shard_k: a tensor-parallel shard's input features must be a multiple of this.
    """

    name: ClassVar[str]
    shard_k: ClassVar[int] = 4

    @classmethod
    @abstractmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        """Return whether ``config`` (a ``quantization_config``) says that it is this format. Never raises."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Format:
        """Read the config; raise FormatError on one that is wrong."""

    @abstractmethod
    def scheme_of(self, module: str) -> Scheme | None:
        """Return the scheme of the linear layer called ``module``, or None if it is stored dense."""

    @abstractmethod
    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        """Return the tensors of a layer (or shard) with ``n`` output and ``k`` input features.

        Args:
            dtype: the model's dtype, which unquantized values and scales may have.
        """

    @abstractmethod
    def to_weight(self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int]) -> Sparse24Weight:
        """Make the hub weight from a layer's tensors.

        Args:
            tensors: by ``TensorSpec.name``.
            parts: output features of each part of a fused layer; one entry for a plain one.

        Raises:
            FormatError, NotSparseError: naming ``module``.
        """


def is_ignored(module: str, patterns: Sequence[str]) -> bool:
    """Return whether ``module`` is named by ``patterns``: an exact name, or ``re:`` and a regular expression."""
    return any(re.match(p[3:], module) is not None if p.startswith("re:") else p == module for p in patterns)
