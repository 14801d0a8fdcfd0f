"""A dense checkpoint seen as a format: one matrix per layer, 2:4 or not, which only its values tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.formats import Format, TensorSpec
from vllm_sparse.formats.base import SCALE_DTYPES
from vllm_sparse.plugin.made_up import quantize_at_load
from vllm_sparse.scheme import SCHEMES, Scheme
from vllm_sparse.weight import Sparse24Weight


@dataclass(frozen=True)
class DenseFormat(Format):
    """Weights as Hugging Face stores them, in bf16, fp16 or float32, without a ``quantization_config``.

    Attributes:
        scheme: what 2:4 layers are quantized to while loading.
    """

    scheme: Scheme

    name = "dense"
    promises_sparse = False

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        return False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DenseFormat:
        return cls(SCHEMES["bf16"])

    def scheme_of(self, module: str) -> Scheme | None:
        return self.scheme

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", (n, k), dtype, 0, 1, accepts=SCALE_DTYPES),)

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        shape = shapes.get("weight")
        return None if shape is None or len(shape) != 2 else (shape[0], shape[1])

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        dense = tensors["weight"]
        if dense.shape[1] % 4:
            raise UnsupportedError(f"{module}: 2:4 needs a multiple of 4 input features, got {dense.shape[1]}")
        weight = Sparse24Weight.from_dense(_storable(dense, module), SCHEMES["bf16"], layer=module)
        weight.validate(module)
        return quantize_at_load(weight, self.scheme, module)


def _storable(dense: Tensor, module: str) -> Tensor:
    """Return ``dense`` in a dtype that 2:4 values may have; float32 only if bf16 holds every value of it."""
    if dense.dtype in SCHEMES["bf16"].value_dtypes:
        return dense
    rounded = dense.to(torch.bfloat16)
    if not torch.equal(rounded.to(dense.dtype), dense):
        raise UnsupportedError(f"{module}: {dense.dtype} values do not fit bf16; load the model with --dtype bfloat16")
    return rounded
