"""Embedding tables in 8 bits, specified in docs/formats.md: int8 codes and one scale for each row, which is a token."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.base import Given, TensorSpec, check_tensors, matrix

_LARGEST = 127
_ROWS = 8192  # rounded at a time, since float32 takes twice the table's memory


def table_tensors(n: int, k: int) -> tuple[TensorSpec, ...]:
    """Return the tensors of a table (or shard) of ``n`` tokens and ``k`` features."""
    return (
        TensorSpec("weight", (n, k), torch.int8, 0, 1, input_multiple=1),
        TensorSpec("weight_scale", (n, 1), torch.bfloat16, 0, None),
    )


def quantize_table(table: Tensor) -> dict[str, Tensor]:
    """Round a float table ``[n, k]`` to nearest; return its tensors by ``TensorSpec.name``."""
    rows = [_quantize_rows(part.float()) for part in table.split(_ROWS)]
    return {"weight": torch.cat([codes for codes, _ in rows]), "weight_scale": torch.cat([scale for _, scale in rows])}


def _quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = (rows.abs().amax(1, keepdim=True) / _LARGEST).bfloat16()
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    # Scales are rounded before codes are, so that the codes make good for it.
    return (rows / scales.float()).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return int8 ``codes`` ``[..., k]`` times bfloat16 ``scales`` ``[..., 1]`` in ``dtype``."""
    return codes.to(dtype) * scales.to(dtype)


def check_table(module: str, given: Given) -> None:
    """Check names, shapes and dtypes of a table's tensors before their data is read; raise FormatError if wrong."""
    size = matrix(module, "weight", {name: shape for name, (shape, _) in given.items()})
    if size is None:
        raise FormatError(f"{module}: tensor weight is missing")
    specs = table_tensors(*size)
    if unexpected := sorted(set(given) - {spec.name for spec in specs}):
        raise FormatError(f"{module}: has an unexpected tensor {unexpected[0]}")
    check_tensors(specs, given, module)


def check_scales(module: str, scales: Tensor) -> None:
    """Raise FormatError unless all ``scales`` are finite and greater than zero."""
    wrong = ~(torch.isfinite(scales) & (scales > 0))
    if bool(wrong.any()):
        raise FormatError(f"{module}: {int(wrong.sum())} scales are not finite and greater than zero")
