"""``mixed-precision`` of compressed-tensors: groups of layers stored in different formats, such as fp8 and w4a16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.base import Format, TensorSpec
from vllm_sparse.formats.compressed_tensors import CompressedTensorsFormat
from vllm_sparse.formats.packed import PackedFormat
from vllm_sparse.formats.quantized import QuantizedFormat
from vllm_sparse.scheme import Scheme
from vllm_sparse.weight import Sparse24Weight


@dataclass(frozen=True)
class MixedFormat(CompressedTensorsFormat):
    """Each group says itself how it is stored.

    Attributes:
        members: the formats of the groups; in each, the groups of other formats have no scheme.
    """

    members: tuple[CompressedTensorsFormat, ...] = ()

    name = "mixed-precision"
    promises_sparse = False
    stored_as = ("mixed-precision",)
    shard_k = PackedFormat.shard_k
    renamed = PackedFormat.renamed

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MixedFormat:
        found = super().from_config(config)
        kinds = {stored: kind for kind in (QuantizedFormat, PackedFormat) for stored in kind.stored_as}
        stored = {group.get("format") for group in (config.get("config_groups") or {}).values()}
        members = [
            kinds[name].from_config({**config, "format": name}) for name in sorted(map(str, stored)) if name in kinds
        ]
        return cls(found.groups, found.ignore, found.stock, tuple(members))

    def scheme_of(self, module: str) -> Scheme | None:
        member = self._member(module)
        return None if member is None else member.scheme_of(module)

    def symmetric_input(self, module: str) -> bool:
        return self._member_of(module).symmetric_input(module)

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        return self._member_of(module).tensors(module, n, k, dtype)

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        member = self._member(module)
        return None if member is None else member.features(module, shapes)

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        return self._member_of(module).to_weight(module, tensors, parts, full_k)

    def _member(self, module: str) -> Format | None:
        return next((member for member in self.members if member.scheme_of(module) is not None), None)

    def _member_of(self, module: str) -> Format:
        member = self._member(module)
        if member is None:
            raise FormatError(f"{module}: the config does not say that this layer is in a format that is read here")
        return member
