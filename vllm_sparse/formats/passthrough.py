"""Checkpoints that vLLM refuses since 0.24 for a ``sparsity_config`` that says "dense" (vLLM issue 51188)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.base import Format, TensorSpec
from vllm_sparse.formats.compressed_tensors import cleaned, is_compressed_tensors, sparsity
from vllm_sparse.scheme import Scheme
from vllm_sparse.weight import Sparse24Weight


@dataclass(frozen=True)
class PassThroughFormat(Format):
    """Nothing in it is 2:4. ``stock_config`` is what vLLM does not trip over; its own methods do the rest."""

    stock: Mapping[str, Any] = field(default_factory=dict)

    name = "pass-through"

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        found = sparsity(config)
        harmless = found.get("format") == "dense" and found.get("sparsity_structure") != "2:4"
        refused = bool(found.get("targets")) and bool(config.get("config_groups"))
        return is_compressed_tensors(config) and harmless and refused and config.get("format") != "marlin-24"

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return True  # vLLM alone refuses it

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PassThroughFormat:
        return cls(cleaned(config))

    def stock_config(self) -> dict[str, Any] | None:
        return dict(self.stock)

    def scheme_of(self, module: str) -> Scheme | None:
        return None

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        raise FormatError(f"{module}: nothing in this checkpoint is 2:4 by its config")

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        return None

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        raise FormatError(f"{module}: nothing in this checkpoint is 2:4 by its config")
