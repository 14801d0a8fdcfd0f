"""``marlin-24``: the layout of the Sparse-Marlin kernel, undone.

Facts from compressed-tensors 0.14.0.1, the last release that writes it. Weights and metadata are permuted by moving
bits of their indices around, so that each permutation is a reshape, a permute and a reshape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.base import SCALE_DTYPES, TensorSpec, check_columns, matrix
from vllm_sparse.formats.compressed_tensors import CompressedTensorsFormat, Group
from vllm_sparse.formats.packed import unpack_columns
from vllm_sparse.scheme import SCHEMES, Scheme
from vllm_sparse.weight import Sparse24Weight

_TILE_N, _TILE_K = 64, 32  # output and input features that are permuted among themselves
# Place of each row of 8 scales in the order in which a thread of the kernel wants them.
_SCALE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_SCHEME_OF_BITS = {4: "w4a16", 8: "w8a16"}


def values_from_marlin(packed: Tensor, bits: int) -> Tensor:
    """Return the kept codes, int8 ``[n, k / 2]``, of a packed weight, int32 ``[k / 32, n * bits / 2]``.

    A row holds the 16 x n tile of kept codes, n in blocks of 64, each as 1024 codes in the order in which the threads
    of a warp read them. Written as digits of the index, from the slowest: n has (4 tiles, 2, 2, 4), k has (2, 4, 2).
    """
    rows = packed.shape[0]
    codes = unpack_columns(packed, bits)
    blocks = codes.shape[1] // 1024
    if bits == 4:  # n0 n1 k1 n3 k2 n2 k0
        digits = codes.reshape(rows, blocks, 4, 2, 4, 4, 2, 2, 2).permute(1, 2, 3, 7, 5, 0, 8, 4, 6)
    else:  # n0 n1 k1 n3 n2 k2 k0
        digits = codes.reshape(rows, blocks, 4, 2, 4, 4, 2, 2, 2).permute(1, 2, 3, 6, 5, 0, 8, 4, 7)
    unsigned = digits.reshape(blocks * _TILE_N, rows * 16)
    return (unsigned - (1 << (bits - 1))).view(torch.int8)


def positions_from_marlin(meta: Tensor) -> Tensor:
    """Return the hub's packed positions ``[n, k / 8]`` of the metadata, int16 ``[k / 32, 2n]``.

    An int16 is four groups of a row, as the hub has them; their order is CUTLASS's column-major interleaved one. Row
    digits (8, 2, 2, 2) from the slowest lie in the order third, first, fourth, column, second.
    """
    rows, columns = meta.shape
    blocks = columns // (2 * _TILE_N)
    digits = meta.reshape(rows, blocks, 2, 8, 2, 2, 2).permute(1, 3, 6, 2, 4, 0, 5)
    return digits.reshape(blocks * _TILE_N, rows * 2).contiguous().view(torch.uint8)


def scales_from_marlin(scales: Tensor, permuted: bool) -> Tensor:
    """Return scales ``[n, groups]`` of ``[groups, n]``, whose runs of eight may be permuted."""
    if permuted:
        undo = [_SCALE_ORDER.index(place) for place in range(8)]
        scales = scales.unflatten(1, (-1, 8))[..., undo].flatten(1)
    return scales.T.reshape(-1).view(scales.shape[1], scales.shape[0])


def marlin_specs(
    names: tuple[str, str, str], bits: int, group_size: int, n: int, k: int, of: str
) -> tuple[TensorSpec, ...]:
    """Return the tensors of a layer, called ``names``: weight, metadata, scales."""
    check_columns(of, k, _TILE_K, "Sparse-Marlin")
    if n % _TILE_N:
        raise FormatError(f"{of}: Sparse-Marlin needs a multiple of {_TILE_N} output features, got {n}")
    groups = 1
    if group_size != -1:
        check_columns(of, k, group_size, f"group size {group_size}")
        groups = k // group_size
    columns = n * 16 * bits // 32
    rows = k // _TILE_K
    weight = TensorSpec(names[0], (rows, columns), torch.int32, 1, 0, False, False, _TILE_N, _TILE_K)
    meta = TensorSpec(names[1], (rows, 2 * n), torch.int16, 1, 0, False, False, _TILE_N, _TILE_K)
    input_dim = None if group_size == -1 else 0
    size = max(_TILE_K, group_size)
    scales = TensorSpec(
        names[2], (groups, n), torch.float16, 1, input_dim, False, False, _TILE_N, size, accepts=SCALE_DTYPES
    )
    return weight, meta, scales


def marlin_features(
    module: str, weight: str, bits: int, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, int] | None:
    """Return (n, k) of a layer from the shape of its tensor ``weight``."""
    shape = matrix(module, weight, shapes)
    return shape and (shape[1] * 32 // (16 * bits), shape[0] * _TILE_K)


def marlin_weight(
    weight: Tensor, meta: Tensor, scales: Tensor, bits: int, group_size: int, permuted: bool, module: str
) -> Sparse24Weight:
    """Return the hub weight of a layer's three tensors; ``permuted`` tells of its scales."""
    return Sparse24Weight(
        SCHEMES[_SCHEME_OF_BITS[bits]],
        values_from_marlin(weight, bits),
        positions_from_marlin(meta),
        scales_from_marlin(scales, permuted),
        group_size,
        layer=module,
    )


@dataclass(frozen=True)
class Marlin24Format(CompressedTensorsFormat):
    """compressed-tensors with ``format: marlin-24``. Its ``sparsity_config`` says dense; the metadata knows better."""

    name = "marlin-24"
    stored_as = ("marlin-24",)
    shard_n = _TILE_N
    shard_k = _TILE_K
    renamed = {".weight_unpacked": None}

    _names = ("weight_packed", "meta", "scale_packed")

    def stock_config(self) -> dict[str, Any] | None:
        return None  # the layers it leaves alone are not quantized

    def scheme_of(self, module: str) -> Scheme | None:
        group = self.group_of(module)
        if group is None:
            return None
        fits = group.scheme is not None and group.scheme.grouped and group.symmetric and group.group_size in (-1, 128)
        if not fits or group.per_tensor:
            raise FormatError(
                f"{module}: marlin-24 holds symmetric 4- or 8-bit weights with one scale per channel or 128 features"
            )
        return group.scheme

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        group = self.our_group(module)
        return marlin_specs(self._names, _bits(group), group.group_size, n, k, module)

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        if self.scheme_of(module) is None:
            return None
        return marlin_features(module, self._names[0], _bits(self.our_group(module)), shapes)

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        group = self.our_group(module)
        # The writer compared the group size with the number of kept columns, not of all.
        permuted = group.group_size != -1 and group.group_size < full_k // 2
        weight, meta, scales = (tensors[name] for name in self._names)
        return marlin_weight(weight, meta, scales, _bits(group), group.group_size, permuted, module)


def _bits(group: Group) -> int:
    assert group.scheme is not None
    return group.scheme.weight_bits
