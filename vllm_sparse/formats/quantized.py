"""Dense FP8 and INT8 checkpoints of compressed-tensors whose codes are 2:4: ``float-quantized``, ``int-quantized``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError, NotSparseError
from vllm_sparse.formats.base import TensorSpec, check_columns, matrix
from vllm_sparse.formats.compressed_tensors import CompressedTensorsFormat, scale_specs, scales_of, with_input
from vllm_sparse.scheme import Scheme
from vllm_sparse.weight import Sparse24Weight


@dataclass(frozen=True)
class QuantizedFormat(CompressedTensorsFormat):
    """``weight`` is ``[n, k]`` of codes, zeros and all. Whether it is 2:4, only the codes say."""

    name = "quantized"
    promises_sparse = False
    stored_as = ("float-quantized", "int-quantized", "naive-quantized")

    def stock_config(self) -> dict[str, Any] | None:
        # vLLM asserts that weight-only groups of these formats are FP8, so it never gets to see the others.
        groups = self.stock.get("config_groups") or {}
        kept = {name: group for name, group in groups.items() if not _weight_only_int(group)}
        return {**self.stock, "config_groups": kept}

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
        scales = scales_of(group, tensors, parts)
        try:
            weight = Sparse24Weight.from_dense(tensors["weight"], group.scheme, scales, group.group_size, layer=module)
        except NotSparseError as error:
            if group.scheme.activation is not None:
                raise
            # Not a NotSparseError, which asks for vLLM's own method: it has none for these.
            raise FormatError(f"{error}; vLLM itself does not serve weight-only INT8 in this format") from error
        return with_input(weight, group, tensors, module)


def _weight_only_int(group: Mapping[str, Any]) -> bool:
    weights = group.get("weights") or {}
    return not group.get("input_activations") and weights.get("type", "int") == "int"
