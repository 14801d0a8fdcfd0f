"""GPTQ checkpoints with ``checkpoint_format: marlin_24``: the bits of ``marlin-24`` under other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.base import Format, TensorSpec
from vllm_sparse.formats.marlin24 import marlin_features, marlin_specs, marlin_weight
from vllm_sparse.scheme import SCHEMES, Scheme
from vllm_sparse.weight import Sparse24Weight

_NAMES = ("B_24", "B_meta", "s")


@dataclass(frozen=True)
class GptqMarlin24Format(Format):
    """Every linear layer but ``lm_head`` is quantized."""

    bits: int
    group_size: int
    ignore: tuple[str, ...] = ("lm_head",)

    name = "gptq_marlin_24"
    shard_n = 64
    shard_k = 32

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        named = config.get("quant_method") == cls.name or config.get("is_marlin_24_format") is True
        return named or (config.get("quant_method") == "gptq" and config.get("checkpoint_format") == "marlin_24")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GptqMarlin24Format:
        bits, group_size = config.get("bits"), config.get("group_size")
        if type(bits) is not int or bits not in (4, 8):
            raise FormatError(f"quantization_config: bits {bits!r} of a marlin_24 checkpoint is not one of 4, 8")
        if type(group_size) is not int or group_size not in (-1, 128):
            raise FormatError(
                f"quantization_config: group_size {group_size!r} of a marlin_24 checkpoint is not one of -1, 128"
            )
        if config.get("desc_act", False) is not False or config.get("sym", True) is not True:
            raise FormatError("quantization_config: a marlin_24 checkpoint is symmetric and not in activation order")
        return cls(bits, group_size)

    def scheme_of(self, module: str) -> Scheme | None:
        if any(module == name or module.endswith(f".{name}") for name in self.ignore):
            return None
        return SCHEMES["w4a16" if self.bits == 4 else "w8a16"]

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        return marlin_specs(_NAMES, self.bits, self.group_size, n, k, module)

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        return marlin_features(module, _NAMES[0], self.bits, shapes)

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        permuted = self.group_size != -1 and self.group_size < full_k
        weight, meta, scales = (tensors[name] for name in _NAMES)
        return marlin_weight(weight, meta, scales, self.bits, self.group_size, permuted, module)
