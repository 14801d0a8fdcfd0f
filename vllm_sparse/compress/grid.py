"""The grid a quantized weight lives on: its scales, rounding to it, and the search for the scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.scheme import Scheme

# Shrinking the largest magnitude clips few weights and makes the steps of all others smaller.
_ROWS = 64  # whose scales a CPU searches at once, in its caches
_SHRINK = tuple(1 - step / 50 for step in range(1, 26))


@dataclass(frozen=True)
class Grid:
    """Symmetric quantization of a weight ``[n, k]``: code times scale, no zero point.

    Attributes:
        scheme: one with scales.
        scales: ``[n, 1]`` or ``[n, k / group_size]``, float32 holding values exact in the dtype they are stored in.
        group_size: input features per scale, -1 for one per output channel.
    """

    scheme: Scheme
    scales: Tensor
    group_size: int = -1

    def column_scales(self, j: int) -> Tensor:
        """Return the scale of every row at input feature ``j``, ``[n]``."""
        return self.scales[:, 0 if self.group_size == -1 else j // self.group_size]

    def transposed_scales(self, columns: Tensor) -> Tensor:
        """Return the scales of every row at input features ``columns`` ``[c]``, as ``[c, n]``."""
        index = torch.zeros_like(columns) if self.group_size == -1 else columns // self.group_size
        return self.scales.T[index].contiguous()

    def round(self, column: Tensor, j: int) -> Tensor:
        """Return ``column`` ``[n]``, input feature ``j`` of the weight, rounded to the grid."""
        scale = self.column_scales(j)
        return round_codes(column / scale, self.scheme) * scale

    def encode(self, weight: Tensor) -> Tensor:
        """Return the codes of ``weight`` ``[n, k]`` in the dtype the scheme stores."""
        codes = weight.unflatten(1, (self.scales.shape[1], -1)) / self.scales.unsqueeze(-1)
        return round_codes(codes, self.scheme).flatten(1).to(self.scheme.value_dtypes[0])


def fused_columns(weight: Tensor) -> Any:
    """Return the module whose loops over columns run where float32 ``weight`` is, or None where there is none."""
    if weight.is_cuda:
        from vllm_sparse.compress import columns

        return columns
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    from vllm_sparse.compress import columns_cpu

    return columns_cpu if columns_cpu.available() else None


def fused_block(weight: Tensor, block: int) -> int:
    """Return how many columns of ``weight`` to decide between products: ``block``, or what a fused loop holds."""
    if not weight.is_cuda:
        return block
    from vllm_sparse.compress.columns import BLOCK

    return BLOCK


def round_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Round float ``codes`` to the nearest value that ``scheme`` can hold, clipping what is too large."""
    if scheme.value_dtypes[0] == torch.float8_e4m3fn:
        return codes.clamp(-scheme.max_code, scheme.max_code).to(torch.float8_e4m3fn).to(codes.dtype)
    return codes.round().clamp(-scheme.max_code - 1, scheme.max_code)


def search_grid(
    weight: Tensor,
    scheme: Scheme,
    group_size: int,
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
    search: bool = True,
) -> Grid:
    """Return the grid for ``weight`` ``[n, k]``, the weights as they are after pruning and compensation.

    Args:
        importance: ``[k]``, weight of each column's squared error (the diagonal of H); None for equal ones.
        scale_dtype: what the scales will be stored in; they are rounded to it before anything is rounded with them.
        search: choose the scale with the least squared error; otherwise the largest magnitude maps to the largest code.
    """
    groups = weight.unflatten(1, (1 if group_size == -1 else weight.shape[1] // group_size, -1))
    cost = torch.ones_like(weight[0]) if importance is None else importance
    cost = cost.view(groups.shape[1:])
    rows = len(weight) if weight.is_cuda else _ROWS
    scales = [_scales(part, cost, scheme, scale_dtype, search) for part in groups.split(rows)]
    return Grid(scheme, torch.cat(scales), group_size)


def _scales(groups: Tensor, cost: Tensor, scheme: Scheme, scale_dtype: torch.dtype, search: bool) -> Tensor:
    """Return the scales ``[n, groups]`` of ``groups`` ``[n, groups, size]``."""
    largest = groups.abs().amax(-1)
    # A group of zeros has no scale of its own; any positive one represents it exactly.
    base = torch.where(largest > 0, largest, scheme.max_code) / scheme.max_code
    best = storable(base, scale_dtype)
    if search:
        least = _squared_error(groups, best, cost, scheme)
        for shrink in _SHRINK:
            scales = storable(base * shrink, scale_dtype)
            error = _squared_error(groups, scales, cost, scheme)
            better = error < least
            best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype`` and back, never to zero."""
    return scales.clamp_min(torch.finfo(dtype).tiny).to(dtype).float()


def _squared_error(groups: Tensor, scales: Tensor, cost: Tensor, scheme: Scheme) -> Tensor:
    codes = round_codes(groups / scales.unsqueeze(-1), scheme)
    return ((groups - codes * scales.unsqueeze(-1)).square() * cost).sum(-1)
