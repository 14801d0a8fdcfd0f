"""FP8 W8A8 on Hopper: 2:4 weights as the sparse operand of ``wgmma`` (csrc/cuda/fp8_linear.cuh)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_sparse.kernels.base import Kernel, define_op
from vllm_sparse.weight import LinearSpec, Sparse24Weight

try:
    _cuda: Any = importlib.import_module("vllm_sparse._cuda")
except ImportError as error:  # no nvcc at installation
    _cuda = None
    _IMPORT_ERROR = str(error)

# As in csrc/cuda/fp8_linear.h: a brick holds 64 features x 128 columns, columns are padded to two bricks.
BRICK_FEATURES = 64
BRICK_COLUMNS = 128
BRICK_BYTES = 5120
COLUMN_PADDING = 256
_PADDING_NIBBLES = 0x44


def pack_bricks(values: Tensor, positions: Tensor) -> Tensor:
    """Reorder a weight into the bricks the kernel reads.

    Args:
        values: float8_e4m3fn ``[n, k / 2]`` and positions: uint8 ``[n, ceil(k / 8)]``, as in ``Sparse24Weight``.

    Returns:
        uint8 ``[ceil(n / 64), ceil(k / 256) * 2, 5120]`` on the same device; padding multiplies by zero.
    """
    n, half_k = values.shape
    rows, columns = -n % BRICK_FEATURES, -2 * half_k % COLUMN_PADDING
    codes = pad(values.view(torch.uint8), (0, columns // 2, 0, rows))
    nibbles = pad(positions, (0, codes.shape[1] // 4 - positions.shape[1], 0, rows), value=_PADDING_NIBBLES)
    feature_tiles, column_tiles = codes.shape[0] // BRICK_FEATURES, 2 * codes.shape[1] // BRICK_COLUMNS
    # [tile, group of 8 features, feature, tile, step, chunk of 16 bytes, half]: chunks of 8 features lie together.
    chunks = codes.view(torch.int64).view(feature_tiles, 8, 8, column_tiles, 2, 2, 2)
    chunks = chunks.permute(0, 3, 4, 1, 5, 2, 6).reshape(feature_tiles, column_tiles, -1)
    # [tile, warp, upper half, feature, tile, step, half of the step]: one word per thread of the warpgroup and step.
    words = nibbles.view(torch.int32).view(feature_tiles, 4, 2, 8, column_tiles, 2, 2)
    words = words.permute(0, 4, 1, 3, 6, 2, 5).reshape(feature_tiles, column_tiles, -1)
    return torch.cat((chunks.view(torch.uint8), words.view(torch.uint8)), dim=-1)


def _linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, n: int, dtype: torch.dtype
) -> Tensor:
    m, k = x.shape
    if x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16:
        x = x.contiguous()
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    _cuda.fp8_linear(
        x.data_ptr(),
        x.stride(0) if m > 1 else k,
        x_scale.data_ptr(),
        x_scale.numel() > 1,
        weight.data_ptr(),
        weight_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        dtype == torch.float16,
        m,
        n,
        k,
        x.device.index,
        -1,  # the configuration is chosen by the sizes
        True,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out


def _linear_fake(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, n: int, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((x.shape[0], n), dtype=dtype)


define_op(
    "fp8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, int n, ScalarType dtype) "
    "-> Tensor",
    _linear,
    _linear_fake,
    "CUDA",
)


class CudaFp8Kernel(Kernel):
    """Scheme fp8 on compute capability 9.0: any m, n a multiple of 16, k a multiple of 32; output bf16 or fp16.

    Takes e4m3 codes ``[m, k]`` with float32 scales, ``[m, 1]`` per token or ``[1]`` static. Packed tensors:

    - ``weight_packed`` uint8 ``[ceil(n / 64), ceil(k / 256) * 2, 5120]``, see ``pack_bricks``;
    - ``weight_scale`` float32 ``[n rounded up to 64]``;
    - ``input_scale`` float32 ``[1]`` for static activations.
    """

    name = "cuda_fp8"
    quantizes_input = False

    def reason_against(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        if _cuda is None:
            return f"the extension module vllm_sparse._cuda is not built ({_IMPORT_ERROR})"
        if spec.scheme.name != "fp8":
            return f"runs scheme fp8, not {spec.scheme.name}"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"writes bfloat16 or float16, not {spec.dtype}"
        if spec.n % 16 or spec.k % 32:
            return f"needs n a multiple of 16 and k of 32, not n={spec.n} and k={spec.k}"
        capability = torch.cuda.get_device_capability(device)
        if capability != (9, 0):
            return f"uses instructions of compute capability 9.0, this device has {capability[0]}.{capability[1]}"
        return None

    def prepare(self, spec: LinearSpec, weight: Sparse24Weight) -> dict[str, Tensor]:
        assert weight.scales is not None  # scheme fp8 is scaled
        packed = {
            "weight_packed": pack_bricks(weight.values, weight.positions),
            "weight_scale": pad(weight.scales.float().flatten(), (0, -weight.n % BRICK_FEATURES)),
        }
        if weight.input_scale is not None:
            packed["input_scale"] = weight.input_scale
        if weight.device.type == "cuda":
            # The kernel reads the weight before its predecessors in the stream have finished (programmatic dependent
            # launch), so whatever wrote the weight must have.
            torch.cuda.current_stream(weight.device).synchronize()
        return packed

    def apply(
        self, spec: LinearSpec, packed: Mapping[str, Tensor], x: Tensor, x_scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        return torch.ops.vllm_sparse.fp8_linear(
            x, x_scale, packed["weight_packed"], packed["weight_scale"], bias, spec.n, spec.dtype
        )
