"""FP8, INT8 and 16-bit layers on Hopper, 2:4 weights as the sparse operand of ``wgmma`` (csrc/cuda/hopper_*)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_sparse.kernels.base import MOST_OVERLAPPED_TOKENS, Kernel, define_op, zero_point_tensors
from vllm_sparse.native import pointer
from vllm_sparse.weight import LinearSpec, Sparse24Weight

try:
    _cuda: Any = importlib.import_module("vllm_sparse._cuda")
except ImportError as error:  # no nvcc at installation
    _cuda = None
    _IMPORT_ERROR = str(error)

# As in csrc/cuda/hopper_linear.h: a brick holds 64 features x 128 bytes of x; columns are padded to two bricks.
BRICK_FEATURES = 64
BRICK_ROW_BYTES = 128
PADDING_BRICKS = 2
_PADDING_NIBBLES = 0x44
# Element, in the order of the enumeration there.
ELEMENTS = (torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float16)


def pack_bricks(values: Tensor, positions: Tensor) -> Tensor:
    """Reorder a weight into the bricks the kernel reads.

    Args:
        values: float8_e4m3fn, int8, bf16 or fp16 ``[n, k / 2]`` and positions: uint8 ``[n, ceil(k / 8)]``, as in
            ``Sparse24Weight``.

    Returns:
        uint8 ``[ceil(n / 64), bricks, bytes]`` on the same device: 5120 bytes for 128 columns of 8 bits, 4608 for 64
        columns of 16, an even number of bricks; padding multiplies by zero.
    """
    kept_bytes = BRICK_ROW_BYTES // 2
    rows = -values.shape[0] % BRICK_FEATURES
    codes = values.view(torch.uint8)
    codes = pad(codes, (0, -codes.shape[1] % (PADDING_BRICKS * kept_bytes), 0, rows))
    nibble_bytes = codes.shape[1] // (4 * values.element_size())
    nibbles = pad(positions, (0, nibble_bytes - positions.shape[1], 0, rows), value=_PADDING_NIBBLES)
    feature_tiles, bricks = codes.shape[0] // BRICK_FEATURES, codes.shape[1] // kept_bytes
    # [tile, group of 8 features, feature, brick, step, chunk of 16 bytes, half]: chunks of 8 features lie together.
    chunks = codes.view(torch.int64).view(feature_tiles, 8, 8, bricks, 2, 2, 2)
    chunks = chunks.permute(0, 3, 4, 1, 5, 2, 6).reshape(feature_tiles, bricks, -1)
    # [tile, warp, upper half, feature, brick, step, half of the step]: a thread's word is one half of a step of 8-bit
    # columns, or one of 16-bit columns of two features.
    if values.element_size() == 1:
        words = nibbles.view(torch.int32).view(feature_tiles, 4, 2, 8, bricks, 2, 2).permute(0, 4, 1, 3, 6, 2, 5)
    else:
        words = nibbles.view(torch.int16).view(feature_tiles, 4, 2, 8, bricks, 2, 2).permute(0, 4, 1, 3, 5, 6, 2)
    words = words.reshape(feature_tiles, bricks, -1)
    return torch.cat((chunks.view(torch.uint8), words.view(torch.uint8)), dim=-1)


@lru_cache(4096)  # numbers of tokens times shapes
def _scratch_bytes(device: int, element: int, m: int, n: int, k: int) -> int:
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return int(_cuda.hopper_scratch_bytes(element, m, n, k, multiprocessors))


def _linear(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    m, k = x.shape
    row_bytes = x.stride(0) * x.element_size()
    if x.stride(1) != 1 or row_bytes % 16 or x.data_ptr() % 16:
        x = x.contiguous()
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    element = ELEMENTS.index(x.dtype)
    scratch_bytes = _scratch_bytes(x.device.index, element, m, n, k)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=x.device) if scratch_bytes else None
    _cuda.hopper_linear(
        element,
        x.data_ptr(),
        (x.stride(0) if m > 1 else k) * x.element_size(),
        pointer(x_scale),
        pointer(x_zero),
        x_scale is not None and x_scale.numel() > 1,
        weight.data_ptr(),
        pointer(weight_scale),
        pointer(weight_sum),
        pointer(bias),
        out.data_ptr(),
        dtype == torch.float16,
        m,
        n,
        k,
        x.device.index,
        pointer(scratch),
        -1,  # the configuration is chosen by the sizes
        m <= MOST_OVERLAPPED_TOKENS,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out


def _linear_fake(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], n), dtype=dtype)


define_op(
    "hopper_linear(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor weight, Tensor? weight_scale, Tensor? weight_sum, "
    "Tensor? bias, int n, ScalarType dtype) -> Tensor",
    _linear,
    _linear_fake,
    "CUDA",
)


class _HopperKernel(Kernel):
    """One scheme on compute capability 9.0: any m, n a multiple of 16, rows of x a multiple of 32 bytes.

    Packed tensors:

    - ``weight_packed`` uint8, see ``pack_bricks``;
    - ``weight_scale`` float32 ``[n rounded up to 64]`` and, for static activations, ``input_scale`` float32 ``[1]``,
      for schemes that have them;
    - ``weight_sum`` int32 ``[n]``, each channel's codes added up, where activations have a zero point, and their
      ``input_zero`` int32 ``[1]`` if they are static.
    """

    scheme: ClassVar[str]
    column_multiple: ClassVar[int]

    def reason_against(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        if _cuda is None:
            return f"the extension module vllm_sparse._cuda is not built ({_IMPORT_ERROR})"
        if spec.scheme.name != self.scheme:
            return f"runs scheme {self.scheme}, not {spec.scheme.name}"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"writes bfloat16 or float16, not {spec.dtype}"
        if spec.n % 16 or spec.k % self.column_multiple:
            multiples = f"n a multiple of 16 and k of {self.column_multiple}"
            return f"needs {multiples}, not n={spec.n} and k={spec.k}"
        capability = torch.cuda.get_device_capability(device)
        if capability != (9, 0):
            return f"uses instructions of compute capability 9.0, this device has {capability[0]}.{capability[1]}"
        return None

    def prepare(self, spec: LinearSpec, weight: Sparse24Weight) -> dict[str, Tensor]:
        values = weight.values if weight.scales is not None else weight.values.to(spec.dtype)
        packed = {"weight_packed": pack_bricks(values, weight.positions)}
        if weight.scales is not None:
            packed["weight_scale"] = pad(weight.scales.float().flatten(), (0, -weight.n % BRICK_FEATURES))
        packed |= zero_point_tensors(weight)
        if weight.input_scale is not None:
            packed["input_scale"] = weight.input_scale
        if weight.device.type == "cuda":
            # The kernel reads the weight before its predecessors in the stream have finished (programmatic dependent
            # launch), so whatever wrote the weight must have.
            torch.cuda.current_stream(weight.device).synchronize()
        return packed

    def apply(
        self,
        spec: LinearSpec,
        packed: Mapping[str, Tensor],
        x: Tensor,
        x_scale: Tensor | None,
        bias: Tensor | None,
        x_zero: Tensor | None = None,
    ) -> Tensor:
        return torch.ops.vllm_sparse.hopper_linear(
            x,
            x_scale,
            x_zero,
            packed["weight_packed"],
            packed.get("weight_scale"),
            packed.get("weight_sum"),
            bias,
            spec.n,
            spec.dtype,
        )


class CudaFp8Kernel(_HopperKernel):
    """Scheme fp8: e4m3 codes ``[m, k]`` with float32 scales, ``[m, 1]`` per token or ``[1]`` static."""

    name = "cuda_fp8"
    quantizes_input = False
    scheme = "fp8"
    column_multiple = 32


class CudaInt8Kernel(_HopperKernel):
    """Scheme int8: int8 codes ``[m, k]`` with float32 scales as for fp8. Sums are exact until they are scaled."""

    name = "cuda_int8"
    quantizes_input = False
    scheme = "int8"
    column_multiple = 32


class CudaBf16Kernel(_HopperKernel):
    """Scheme bf16: activations, weight (converted where it is stored in the other) and output all bf16 or all fp16."""

    name = "cuda_bf16"
    quantizes_input = True  # there is nothing to quantize
    scheme = "bf16"
    column_multiple = 16
