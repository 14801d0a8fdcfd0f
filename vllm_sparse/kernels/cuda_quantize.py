"""Dynamic e4m3 quantization of activations on Hopper (csrc/cuda/quantize.cu), one scale per token."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.kernels.base import MOST_OVERLAPPED_TOKENS, contiguous_and_aligned, define_op

try:
    _cuda: Any = importlib.import_module("vllm_sparse._cuda")
except ImportError:  # no nvcc at installation
    _cuda = None


def available() -> bool:
    """Return whether the current device can run ``quantize``."""
    return _cuda is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations, in the arithmetic of vLLM's ``QuantFP8``.

    Args:
        x: bf16 or fp16 ``[m, k]``, k a multiple of 8.

    Returns:
        float8_e4m3fn codes ``[m, k]`` and float32 scales ``[m, 1]``: max(|x|) / 448, but no less than 1 / (448 * 512).
    """
    codes, scale = torch.ops.vllm_sparse.fp8_quantize(x)
    return codes, scale


def silu_multiply_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize ``silu(gate) * up``, both steps rounded to the dtype of ``x``, as ``quantize`` does.

    Args:
        x: bf16 or fp16 ``[m, 2 * k]``, gate beside up, k a multiple of 8.
    """
    codes, scale = torch.ops.vllm_sparse.silu_multiply_fp8_quantize(x)
    return codes, scale


def _launch(x: Tensor, codes: Tensor, scale: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    x = contiguous_and_aligned(x)
    m, k = codes.shape
    stream = torch.cuda.current_stream(x.device).cuda_stream
    half, overlap = x.dtype == torch.float16, m <= MOST_OVERLAPPED_TOKENS
    pointers = codes.data_ptr(), scale.data_ptr()
    _cuda.fp8_quantize(x.data_ptr(), half, gated, *pointers, m, k, x.device.index, overlap, stream)
    return codes, scale


def _outputs(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    m = x.shape[0]
    return x.new_empty((m, k), dtype=torch.float8_e4m3fn), x.new_empty((m, 1), dtype=torch.float32)


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return _outputs(x, x.shape[1])


def _silu_multiply_quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return _outputs(x, x.shape[1] // 2)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return _launch(x, *_quantize_fake(x), gated=False)


def _silu_multiply_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return _launch(x, *_silu_multiply_quantize_fake(x), gated=True)


define_op("fp8_quantize(Tensor x) -> (Tensor, Tensor)", _quantize, _quantize_fake, "CUDA")
define_op(
    "silu_multiply_fp8_quantize(Tensor x) -> (Tensor, Tensor)",
    _silu_multiply_quantize,
    _silu_multiply_quantize_fake,
    "CUDA",
)
