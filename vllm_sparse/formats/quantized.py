"""Dense FP8 and INT8 checkpoints of compressed-tensors whose codes are 2:4: ``float-quantized``, ``int-quantized``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.formats.base import TensorSpec, check_columns, matrix
from vllm_sparse.formats.compressed_tensors import CompressedTensorsFormat, scale_specs, scales_of
from vllm_sparse.scheme import Scheme
from vllm_sparse.weight import Sparse24Weight


@dataclass(frozen=True)
class QuantizedFormat(CompressedTensorsFormat):
    """``weight`` is ``[n, k]`` of codes, zeros and all. Whether it is 2:4, only the codes say."""

    name = "quantized"
    promises_sparse = False
    stored_as = ("float-quantized", "int-quantized", "naive-quantized")

    def scheme_of(self, module: str) -> Scheme | None:
        scheme = super().scheme_of(module)
        return None if scheme is None or scheme.weight_bits != 8 else scheme

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        check_columns(module, k)
        group = self.our_group(module)
        assert group.scheme is not None
        weight = TensorSpec("weight", (n, k), group.scheme.value_dtypes[0], 0, 1)
        return (weight, *scale_specs(group, n, k, dtype, module))

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        # A layer that was left in bf16 has the same tensor but no scale.
        return matrix(module, "weight", shapes) if "weight_scale" in shapes else None

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        group = self.our_group(module)
        assert group.scheme is not None
        scales, input_scale = scales_of(group, tensors, parts)
        return Sparse24Weight.from_dense(
            tensors["weight"], group.scheme, scales, group.group_size, input_scale, layer=module
        )
