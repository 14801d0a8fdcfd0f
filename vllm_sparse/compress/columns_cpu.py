"""The column loops of gptq, descent and sparsegpt on a CPU: csrc/cpu/calibrate.h for a block of columns.

Every array is transposed: column j of the weight is row j, and its rows are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_sparse import native
from vllm_sparse.native import pointer
from vllm_sparse.scheme import Scheme


def available() -> bool:
    """Return whether this CPU and this installation have the loops."""
    return native.cpu is not None and native.tier().has_columns


def gptq_columns(w: Tensor, keep: Tensor, scales: Tensor, factor: Tensor, scheme: Scheme) -> Tensor:
    """Round ``w`` ``[count, n]`` in place to the grid where ``keep`` allows it; return each column's error."""
    return _run(native.cpu.Kind.gptq, w, keep, factor, scales, scheme)


def descent_columns(q: Tensor, gradient: Tensor, keep: Tensor, scales: Tensor, h: Tensor, scheme: Scheme) -> Tensor:
    """Improve ``q`` ``[count, n]`` in place; return the changes."""
    return _run(native.cpu.Kind.descent, q, keep, h, scales, scheme, gradient)


def sparsegpt_columns(
    w: Tensor, keep: Tensor, factor: Tensor, scales: Tensor | None = None, scheme: Scheme | None = None
) -> Tensor:
    """Prune ``w`` ``[count, n]`` to 2:4 in place, round it where there are ``scales``, and fill ``keep``."""
    return _run(native.cpu.Kind.sparsegpt, w, keep, factor, scales, scheme)


def _run(
    kind: Any,
    w: Tensor,
    keep: Tensor,
    square: Tensor,
    scales: Tensor | None,
    scheme: Scheme | None,
    gradient: Tensor | None = None,
) -> Tensor:
    count, n = w.shape
    errors = torch.empty_like(w)
    square = square if square.stride(1) == 1 else square.contiguous()
    max_code = 0.0 if scheme is None else float(scheme.max_code)
    fp8 = scheme is not None and scheme.value_dtypes[0] == torch.float8_e4m3fn
    native.cpu.columns(
        native.tier(), kind, count, n, square.stride(0), w.data_ptr(), pointer(gradient), keep.data_ptr(),
        pointer(scales), square.data_ptr(), errors.data_ptr(), max_code, fp8,
    )  # fmt: skip
    return errors
