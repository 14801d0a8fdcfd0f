"""Encoders of the formats that this package only reads, written from their definitions, for the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.formats.golden import Case
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight, nonzero_mask

# Which two entries of a group CUTLASS's compressor keeps, by the mask of its non-zeros.
_CUTLASS_NIBBLES = (14, 8, 9, 4, 14, 8, 9, 4, 14, 12, 13, 4, 14, 12, 13, 4)


def bitmask_of(dense: Tensor, weight: Sparse24Weight | None = None) -> Tensor:
    """Return the bitmask of the kept entries of ``weight``, or of the non-zeros of ``dense``, 8 columns a byte."""
    marked = nonzero_mask(dense)
    if weight is not None:
        nibbles = weight.nibbles().long()
        index = torch.stack((nibbles & 3, nibbles >> 2), dim=-1)
        marked = torch.zeros(weight.n, weight.k // 4, 4, dtype=torch.bool).scatter_(-1, index, True).flatten(1)
    padded = torch.nn.functional.pad(marked.int(), (0, -marked.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8)).sum(-1).to(torch.uint8)


def encode_bitmask(dense: Tensor) -> dict[str, Tensor]:
    """Encode ``dense``, which is 2:4, as ``sparse-24-bitmask``."""
    scheme = SCHEMES["w8a16" if dense.dtype == torch.int8 else "fp8" if dense.itemsize == 1 else "bf16"]
    scales = torch.ones(dense.shape[0], 1) if scheme.scaled else None
    weight = Sparse24Weight.from_dense(dense, scheme, scales)
    shape = torch.tensor(dense.shape).reshape(2, 1)
    return {"shape": shape, "compressed": weight.values, "bitmask": bitmask_of(dense, weight)}


def encode_legacy(dense: Tensor) -> dict[str, Tensor]:
    """Encode any ``dense`` as ``sparse-bitmask``."""
    marked = nonzero_mask(dense)
    values = dense.view(torch.uint8)[marked].view(dense.dtype) if dense.itemsize == 1 else dense[marked]
    counts = marked.sum(1)
    tensors = {"shape": torch.tensor(dense.shape), "compressed": values, "bitmask": bitmask_of(dense)}
    return tensors | {"row_offsets": counts.cumsum(0) - counts}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes ``[n, c]`` into int32 along the columns, lowest bits first, 2^(bits - 1) added."""
    unsigned = codes.long() + (1 << (bits - 1))
    unsigned = unsigned.unflatten(1, (-1, 32 // bits)) << (torch.arange(32 // bits) * bits)
    return unsigned.sum(-1).to(torch.int64).bitwise_and(0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def encode_packed(codes: Tensor, bits: int, zeros: Tensor | None) -> dict[str, Tensor]:
    """Encode codes (less their zero points) as ``pack-quantized``."""
    tensors = {"weight_shape": torch.tensor(codes.shape)}
    if zeros is not None:
        codes = (codes.unflatten(1, (zeros.shape[1], -1)) + zeros.unsqueeze(-1)).flatten(1)
        tensors["weight_zero_point"] = pack(zeros.T, bits).T.contiguous()
    return tensors | {"weight_packed": pack(codes, bits)}


def encode_marlin(codes: Tensor, scales: Tensor, bits: int, permute_scales: bool) -> dict[str, Tensor]:
    """Encode 2:4 codes ``[n, k]`` and scales ``[n, groups]`` as ``marlin-24``, one element at a time."""
    n, k = codes.shape
    mask = (codes.unflatten(1, (-1, 4)) != 0).long() @ torch.tensor([1, 2, 4, 8])
    nibbles = torch.tensor(_CUTLASS_NIBBLES)[mask]
    index = torch.stack((nibbles & 3, nibbles >> 2), dim=-1)
    kept = codes.unflatten(1, (-1, 4)).gather(-1, index).flatten(1)
    order = _marlin_order(bits)
    tiles = kept.T.reshape(k // 32, 16, n // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
    packed = pack(tiles[:, order].reshape(k // 32, n * 16), bits)
    words = (nibbles.unflatten(1, (-1, 4)) << torch.tensor([0, 4, 8, 12])).sum(-1)
    meta = torch.empty(n * k // 16, dtype=torch.int64)
    for row in range(n):
        for column in range(k // 16):
            meta[_cutlass_place(row, column, n)] = words[row, column]
    meta = meta.to(torch.int32).to(torch.int16).reshape(k // 32, 2 * n)
    scales = scales.T.contiguous()
    if permute_scales:
        scales = scales.unflatten(1, (-1, 8))[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1)
    return {"weight_packed": packed, "meta": meta, "scale_packed": scales}


def _marlin_order(bits: int) -> list[int]:
    """Return which element of four 16 x 16 tiles is at each place of 1024."""
    order = []
    for lane in range(32):
        rows = [2 * (lane % 4) + extra for extra in (0, 1, 8, 9)]
        for j in range(4):
            column = lane // 4 % 2 * 8 + j
            order += [lane // 8 * 256 + row * 16 + column + 4 * half for half in range(2) for row in rows]
    shuffle = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    step = len(shuffle)
    return [order[start + place] for start in range(0, 1024, step) for place in shuffle]


def _cutlass_place(row: int, column: int, n: int) -> int:
    """Return where CUTLASS's interleaved layout has the metadata word of a row and column."""
    place = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    if place % 2 == 0 and column % 2 == 1:
        place, column = place + 1, column - 1
    elif place % 2 == 1 and column % 2 == 0:
        place, column = place - 1, column + 1
    return column // 2 * 2 * n + place * 2 + column % 2


def encode(case: Case, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a golden case in its format."""
    codes = made["codes"]
    scales = {"weight_scale": made["scales"]} if "scales" in made else {}
    if case.format == "sparse-24-bitmask":
        return encode_bitmask(codes) | scales
    if case.format == "sparse-bitmask":
        return encode_legacy(codes) | scales
    if case.format == "marlin-24":
        return encode_marlin(codes, made["scales"], case.bits, 0 < case.group_size < case.k // 2)
    if case.format == "pack-quantized":
        return encode_packed(codes, case.bits, made.get("zeros")) | scales
    return {"weight": codes} | scales
