"""``pack-quantized`` of compressed-tensors: integer codes, dense, several in an int32, which may happen to be 2:4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.base import TensorSpec, check_columns, matrix
from vllm_sparse.formats.compressed_tensors import CompressedTensorsFormat, Group, scale_specs, scales_of
from vllm_sparse.scheme import Scheme
from vllm_sparse.weight import Sparse24Weight


def unpack_columns(packed: Tensor, bits: int) -> Tensor:
    """Return the unsigned codes of int32 ``[n, c]``, lowest bits first: uint8 ``[n, c * 32 / bits]``."""
    # Flat first: a matrix of one column may be contiguous with a stride that a view of bytes does not accept.
    data = packed.reshape(-1).contiguous().view(torch.uint8).view(packed.shape[0], 4 * packed.shape[1])
    return data if bits == 8 else torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


@dataclass(frozen=True)
class PackedFormat(CompressedTensorsFormat):
    """Codes are stored with 2^(bits - 1) added. A weight is zero where its code is the zero point."""

    name = "pack-quantized"
    promises_sparse = False
    stored_as = ("pack-quantized",)
    shard_k = 8

    def scheme_of(self, module: str) -> Scheme | None:
        scheme = super().scheme_of(module)
        return None if scheme is None or scheme.activation is not None else scheme

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        group = self.our_group(module)
        per_int = 32 // _bits(group)
        check_columns(module, k, max(4, per_int), self.name)
        packed = TensorSpec("weight_packed", (n, k // per_int), torch.int32, 0, 1, input_multiple=max(4, per_int))
        shape = TensorSpec("weight_shape", (2,), torch.int64, None, None, metadata=True)
        specs = [packed, shape, *scale_specs(group, n, k, dtype, module)]
        if not group.symmetric:
            if n % per_int:
                raise FormatError(f"{module}: zero points need a multiple of {per_int} output features, got {n}")
            columns = 1 if group.group_size == -1 else k // group.group_size
            specs.append(
                TensorSpec(
                    "weight_zero_point",
                    (n // per_int, columns),
                    torch.int32,
                    0,
                    None if group.group_size == -1 else 1,
                    output_multiple=per_int,
                    input_multiple=max(4, group.group_size),
                )
            )
        return tuple(specs)

    @staticmethod
    def zero_points(packed: Tensor, bits: int) -> Tensor:
        """Return the zero points, int8 ``[n, groups]``, which are packed along n."""
        return (unpack_columns(packed.T, bits).T - (1 << (bits - 1))).contiguous().view(torch.int8)

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        shape = matrix(module, "weight_packed", shapes)
        if shape is None or self.scheme_of(module) is None:
            return None
        return shape[0], shape[1] * (32 // _bits(self.our_group(module)))

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        group = self.our_group(module)
        bits, scheme = _bits(group), group.scheme
        assert scheme is not None
        codes = (unpack_columns(tensors["weight_packed"], bits) - (1 << (bits - 1))).view(torch.int8)
        n, k = codes.shape
        if "weight_shape" in tensors and tensors["weight_shape"].flatten().tolist() != [n, k]:
            told = tensors["weight_shape"].flatten().tolist()
            raise FormatError(f"{module}: weight_shape says {told}, the tensors {[n, k]}")
        if not group.symmetric:
            zeros = self.zero_points(tensors["weight_zero_point"], bits)
            codes = (codes.unflatten(1, (zeros.shape[1], -1)) - zeros.unsqueeze(-1)).flatten(1)
        scales = scales_of(group, tensors, parts)
        return Sparse24Weight.from_dense(codes, scheme, scales, group.group_size, layer=module)


def _bits(group: Group) -> int:
    """Return the bits of a code on disk: asymmetric codes of 4 bits become weights of 8."""
    assert group.scheme is not None
    return group.scheme.weight_bits if group.symmetric else 4
