"""Residual sum and RMSNorm on Hopper (csrc/cuda/norm.cu), so that the linear layer behind starts while it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_sparse.kernels.base import MOST_OVERLAPPED_TOKENS, contiguous_and_aligned, define_op
from vllm_sparse.kernels.cuda_quantize import _cuda, available

__all__ = ["MOST_COLUMNS", "add_rms_norm", "add_rms_norm_quantize", "available"]

MOST_COLUMNS = 131072  # of a row, as in csrc/cuda/token_rows.cuh


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x + residual`` and the sum, in the arithmetic of vLLM's ``fused_add_rms_norm``.

    Args:
        x, residual: bf16 or fp16 ``[m, k]``, k a multiple of 8 up to ``MOST_COLUMNS``.
        weight: ``[k]`` of their dtype.
        epsilon: added to the mean of the squares.
    """
    normed, total = torch.ops.vllm_sparse.add_rms_norm(x, residual, weight, epsilon)
    return normed, total


def add_rms_norm_quantize(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``cuda_quantize.quantize`` of what ``add_rms_norm`` normalizes (codes, scales), and the sum."""
    codes, scale, total = torch.ops.vllm_sparse.add_rms_norm_fp8_quantize(x, residual, weight, epsilon)
    return codes, scale, total


def _launch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    total: Tensor,
    normed: Tensor | None = None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    m, k = x.shape
    inputs = [contiguous_and_aligned(tensor) for tensor in (x, residual, weight)]
    outputs = [0 if tensor is None else tensor.data_ptr() for tensor in (total, normed, codes, scale)]
    _cuda.add_norm(
        *(tensor.data_ptr() for tensor in inputs),
        *outputs,
        x.dtype == torch.float16,
        epsilon,
        m,
        k,
        x.device.index,
        m <= MOST_OVERLAPPED_TOKENS,
        torch.cuda.current_stream(x.device).cuda_stream,
    )


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    normed, total = _add_rms_norm_fake(x, residual, weight, epsilon)
    _launch(x, residual, weight, epsilon, total, normed=normed)
    return normed, total


def _add_rms_norm_quantize_fake(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return codes, x.new_empty((x.shape[0], 1), dtype=torch.float32), x.new_empty(x.shape)


def _add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, total = _add_rms_norm_quantize_fake(x, residual, weight, epsilon)
    _launch(x, residual, weight, epsilon, total, codes=codes, scale=scale)
    return codes, scale, total


_ARGUMENTS = "Tensor x, Tensor residual, Tensor weight, float epsilon"
define_op(f"add_rms_norm({_ARGUMENTS}) -> (Tensor, Tensor)", _add_rms_norm, _add_rms_norm_fake, "CUDA")
define_op(
    f"add_rms_norm_fp8_quantize({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm_quantize,
    _add_rms_norm_quantize_fake,
    "CUDA",
)
