"""Every scheme but w4a16 on NVIDIA GPUs since Ampere: 2:4 weights as the sparse operand of ``mma.sp``
(csrc/cuda/mma_linear.cuh)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_sparse.kernels.base import (
    MOST_OVERLAPPED_TOKENS,
    Kernel,
    contiguous_and_aligned,
    define_op,
    zero_point_tensors,
)
from vllm_sparse.native import pointer
from vllm_sparse.weight import LinearSpec, Sparse24Weight

try:
    _cuda: Any = importlib.import_module("vllm_sparse._cuda")
except ImportError as error:  # no nvcc at installation
    _cuda = None
    _IMPORT_ERROR = str(error)

# As in csrc/cuda/mma_linear.h.
TILE_ROWS = 128
TILE_BLOCKS = 8  # of 16 rows
NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}
_BY_THE_SIZES = -1
_PADDING_NIBBLES = 0x44


def step_columns(values: torch.dtype, activation: torch.dtype) -> int:
    """Return how many input features a packed step holds."""
    return 64 if values.itemsize == activation.itemsize == 2 else 128


def _pack_values(values: Tensor, tiles: int, steps: int, widen: bool) -> Tensor:
    """Return ``[tiles, steps, 8, 1024]`` bytes: what each lane reads at once, for two units or (``widen``) four.

    A lane (g, t) holds rows g and g + 8; its four operand registers are (row g, row g + 8) of the kept bytes 4t and
    16 + 4t of a unit. Codes that are widened come as two bytes per register, two registers in a word: bytes 0 and 2
    are the one of row g, 1 and 3 that of row g + 8.
    """
    if widen:
        # [tile, block, upper row, g, step, two units, unit, upper columns, t, column]
        parts = values.view(torch.int8).view(tiles, TILE_BLOCKS, 2, 8, steps, 2, 2, 2, 4, 2)
        parts = parts.permute(0, 4, 1, 5, 3, 8, 6, 7, 9, 2)
    else:
        # [tile, block, upper row, g, step, unit, upper columns, t]
        parts = values.view(torch.int32).view(tiles, TILE_BLOCKS, 2, 8, steps, 2, 2, 4)
        parts = parts.permute(0, 4, 1, 5, 3, 7, 6, 2)
    return parts.contiguous().view(torch.uint8).reshape(tiles, steps, TILE_BLOCKS, -1)


def _pack_positions(positions: Tensor, tiles: int, steps: int, activation: torch.dtype, widen: bool) -> Tensor:
    """Return ``[tiles, steps, 8, 128 or 256]`` bytes: each lane's words of positions."""
    if activation.itemsize == 1:
        # A word per unit: eight groups of one row. [tile, block, upper row, g, step, unit, half of the unit]
        words = positions.view(torch.int32).view(tiles, TILE_BLOCKS, 2, 8, steps, 2, 2)
        words = words.permute(0, 4, 1, 3, 6, 2, 5)
    else:
        # A word per two units: four groups of rows g and g + 8.
        # [tile, block, upper row, g, step, two units, unit, half of the unit]
        words = positions.view(torch.int16).view(tiles, TILE_BLOCKS, 2, 8, steps, 2 if widen else 1, 2, 2)
        words = words.permute(0, 4, 1, 3, 6, 7, 5, 2)
    return words.contiguous().view(torch.uint8).reshape(tiles, steps, TILE_BLOCKS, -1)


def _pack_scales(scales: Tensor, tiles: int, steps: int, groups: int) -> Tensor:
    """Return ``[tiles, steps, 8, 32 * groups]`` bytes: for each g and group the scales of rows g and g + 8."""
    padded = pad(scales, (0, steps * groups - scales.shape[1], 0, tiles * TILE_ROWS - scales.shape[0]))
    padded = padded.view(tiles, TILE_BLOCKS, 2, 8, steps, groups).permute(0, 4, 1, 3, 5, 2).contiguous()
    return padded.view(torch.uint8).reshape(tiles, steps, TILE_BLOCKS, -1)


def pack_tiles(
    values: Tensor, positions: Tensor, scales: Tensor | None, group_size: int, activation: torch.dtype
) -> Tensor:
    """Reorder a weight into what a block reads in one piece per tile of 128 rows and step.

    Args:
        values: ``[n, k / 2]``, n a multiple of 16 and k of 32; of dtype ``activation``, or int8 or e4m3 to be widened.
        positions: uint8 ``[n, k / 8]``, as in ``Sparse24Weight``.
        scales: of dtype ``activation``, ``[n, k / group_size]``, or None (per channel, applied to the sums).
        group_size: 32, 64 or 128 with scales, else -1.
        activation: dtype of the tokens.

    Returns:
        uint8 ``[tiles, steps, 8, bytes]``: for each row block of 16 rows its values, positions and scales. There is an
        even number of steps where nothing is widened. Padding multiplies by zero.
    """
    n, half_k = values.shape
    widen, columns = values.dtype != activation, step_columns(values.dtype, activation)
    tiles, multiple = -(-n // TILE_ROWS), 1 if widen else 2
    steps = -(-2 * half_k // (multiple * columns)) * multiple
    rows = tiles * TILE_ROWS - n
    raw = values.view(torch.int8) if values.itemsize == 1 else values.view(torch.int16)
    raw = pad(raw, (0, steps * columns // 2 - half_k, 0, rows))
    nibbles = pad(positions, (0, steps * columns // 8 - positions.shape[1], 0, rows), value=_PADDING_NIBBLES)
    parts = [_pack_values(raw, tiles, steps, widen), _pack_positions(nibbles, tiles, steps, activation, widen)]
    if scales is not None:
        parts.append(_pack_scales(scales, tiles, steps, columns // group_size))
    return torch.cat(parts, dim=-1)


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """Return the number of multiprocessors and 10 * major + minor of the compute capability."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


_GRAPHS = -1  # in place of a stream
_workspaces: dict[tuple[int, int], Tensor] = {}


def _make_workspace(device: torch.device, stream: int) -> Tensor:
    size = _cuda.mma_workspace_bytes(_device(device.index)[0])
    return _workspaces.setdefault((device.index, stream), torch.zeros(size, dtype=torch.uint8, device=device))


def _workspace(device: torch.device) -> Tensor:
    """Return the zeroed workspace of the current stream, or of all graphs while one is captured.

    Memory first asked for during a capture would be zeroed by the graph alone, hence one workspace for graphs, made by
    ``prepare``: graphs of one device must not be replayed at the same time.
    """
    stream = _GRAPHS if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream
    found = _workspaces.get((device.index, stream))
    return _make_workspace(device, stream) if found is None else found


def _linear(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: Tensor,
    channel_scale: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    n: int,
    group_size: int,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    m, k = x.shape
    x = contiguous_and_aligned(x)
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    sm_count, capability = _device(x.device.index)
    _cuda.mma_linear(
        x.data_ptr(),
        pointer(x_scale),
        pointer(x_zero),
        x_scale is not None and x_scale.numel() > 1,
        weight.data_ptr(),
        pointer(channel_scale),
        pointer(weight_sum),
        pointer(bias),
        y.data_ptr(),
        _workspace(x.device).data_ptr(),
        m,
        n,
        k,
        group_size,
        NUMBERS[weight_dtype],
        NUMBERS[x.dtype],
        NUMBERS[dtype],
        _BY_THE_SIZES,
        x.device.index,
        sm_count,
        capability,
        capability >= 90 and m <= MOST_OVERLAPPED_TOKENS,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return y


def _linear_fake(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: Tensor,
    channel_scale: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    n: int,
    group_size: int,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], n), dtype=dtype)


define_op(
    "mma_linear(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor weight, Tensor? channel_scale, Tensor? weight_sum, "
    "Tensor? bias, int n, int group_size, ScalarType weight_dtype, ScalarType dtype) -> Tensor",
    _linear,
    _linear_fake,
    "CUDA",
)


class CudaMmaKernel(Kernel):
    """Schemes bf16, int8, w8a16 (compute capability 8.0 and later) and fp8 (8.9 and later); bf16 or fp16 outside.

    Any m, n a multiple of 16, k of 32. Values of scheme bf16 are rounded to the activations' dtype, and so are group
    scales. Packed tensors:

    - ``weight_packed`` uint8, see ``pack_tiles``;
    - ``weight_scale`` float32 ``[n]`` where scales are per channel;
    - ``weight_sum`` int32 ``[n]``, each channel's codes added up, where activations have a zero point;
    - ``input_scale`` float32 ``[1]`` for static activations, ``input_zero`` int32 ``[1]`` if those have a zero point.
    """

    name = "cuda_mma"
    quantizes_input = False
    schemes: tuple[str, ...] = ("bf16", "fp8", "int8", "w8a16")

    def reason_against(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        if _cuda is None:
            return f"the extension module vllm_sparse._cuda is not built ({_IMPORT_ERROR})"
        if spec.scheme.name not in self.schemes:
            return f"runs scheme {' or '.join(self.schemes)}, not {spec.scheme.name}"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"writes bfloat16 or float16, not {spec.dtype}"
        if spec.n % 16 or spec.k % 32:
            return f"needs n a multiple of 16 and k of 32, not n={spec.n} and k={spec.k}"
        return self._reason_against_device(spec, torch.cuda.get_device_capability(device))

    def _reason_against_device(self, spec: LinearSpec, capability: tuple[int, int]) -> str | None:
        needed = (8, 9) if spec.scheme.name == "fp8" else (8, 0)
        if capability < needed:
            return (
                f"needs compute capability {needed[0]}.{needed[1]} for scheme {spec.scheme.name}, "
                f"this device has {capability[0]}.{capability[1]}"
            )
        return None

    def prepare(self, spec: LinearSpec, weight: Sparse24Weight) -> dict[str, Tensor]:
        values = weight.values if weight.scales is not None else weight.values.to(spec.dtype)
        activation = self._activation(spec)
        grouped = weight.group_size != -1 and weight.scales is not None
        scales = weight.scales.to(activation) if grouped and weight.scales is not None else None
        packed = {"weight_packed": pack_tiles(values, weight.positions, scales, weight.group_size, activation)}
        if weight.scales is not None and not grouped:
            packed["weight_scale"] = weight.scales.float().flatten()
        packed |= zero_point_tensors(weight)
        if weight.input_scale is not None:
            packed["input_scale"] = weight.input_scale
        if weight.device.type == "cuda":
            _make_workspace(weight.device, _GRAPHS).zero_()  # again for a reload, after a sleep that lost its contents
            # The kernel reads the weight before its predecessors in the stream have finished (programmatic dependent
            # launch), so whatever wrote the weight must have.
            torch.cuda.current_stream(weight.device).synchronize()
        return packed

    def _activation(self, spec: LinearSpec) -> torch.dtype:
        """Return the dtype that tokens are multiplied in."""
        return spec.scheme.activation or spec.dtype

    def apply(
        self,
        spec: LinearSpec,
        packed: Mapping[str, Tensor],
        x: Tensor,
        x_scale: Tensor | None,
        bias: Tensor | None,
        x_zero: Tensor | None = None,
    ) -> Tensor:
        values = spec.scheme.value_dtypes[0] if spec.scheme.scaled else spec.dtype
        return torch.ops.vllm_sparse.mma_linear(
            x,
            x_scale,
            x_zero,
            packed["weight_packed"],
            packed.get("weight_scale"),
            packed.get("weight_sum"),
            bias,
            spec.n,
            spec.group_size,
            values,
            spec.dtype,
        )


class CudaMmaFp8A16Kernel(CudaMmaKernel):
    """Scheme fp8 where the GPU has no FP8 tensor cores: weights are widened, activations stay bf16 or fp16.

    Packed tensors as those of ``CudaMmaKernel``.
    """

    name = "cuda_mma_fp8_a16"
    quantizes_input = True
    schemes = ("fp8",)

    def _reason_against_device(self, spec: LinearSpec, capability: tuple[int, int]) -> str | None:
        if capability < (8, 0):
            return f"needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
        if capability >= (8, 9):
            return "is for GPUs without FP8 tensor cores, this device has them"
        return None

    def _activation(self, spec: LinearSpec) -> torch.dtype:
        return spec.dtype
