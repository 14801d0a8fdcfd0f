"""Dense bf16 or fp16 checkpoints whose weights are 2:4, as every pruning tool writes them today."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.formats.base import Format, TensorSpec, check_columns
from vllm_sparse.formats.compressed_tensors import is_compressed_tensors, sparsity
from vllm_sparse.scheme import SCHEMES, Scheme
from vllm_sparse.weight import Sparse24Weight

_DTYPES = SCHEMES["bf16"].value_dtypes


@dataclass(frozen=True)
class DenseFormat(Format):
    """No ``quantization_config``, or one that quantizes nothing. Whether a layer is 2:4, only its weight says."""

    name = "dense"
    promises_sparse = False

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        plain = sparsity(config).get("format") in (None, "dense") and config.get("format") in (None, "dense")
        return not config or (is_compressed_tensors(config) and not config.get("config_groups") and plain)

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return sparsity(config).get("sparsity_structure") == "2:4"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DenseFormat:
        return cls()

    def scheme_of(self, module: str) -> Scheme | None:
        return SCHEMES["bf16"]

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        check_columns(module, k)
        return (TensorSpec("weight", (n, k), dtype, 0, 1, accepts=_DTYPES),)

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        shape = shapes.get("weight", ())
        # Norms and convolutions have a weight as well, and one whose rows are no groups of four is never 2:4.
        return (shape[0], shape[1]) if len(shape) == 2 and shape[1] and shape[1] % 4 == 0 else None

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        return Sparse24Weight.from_dense(tensors["weight"], SCHEMES["bf16"], layer=module)
