"""W4A16 on NVIDIA GPUs since Ampere: int4 2:4 weights as the sparse tensor-core operand (csrc/cuda/w4a16*)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_sparse.kernels.base import MOST_OVERLAPPED_TOKENS, Kernel, contiguous_and_aligned, define_op
from vllm_sparse.weight import LinearSpec, Sparse24Weight

try:
    _cuda: Any = importlib.import_module("vllm_sparse._cuda")
except ImportError as error:  # no nvcc at installation
    _cuda = None
    _IMPORT_ERROR = str(error)

# As in csrc/cuda/w4a16.h.
STEP = 128  # input features of a packed step
PANEL_BLOCKS = 16  # row blocks of a panel
ROW_BLOCK = 16  # output features of a row block
AUTO_KERNEL = -1
_COUNTER_BYTES = 4096  # zero at the workspace's beginning
# W4A16Output of csrc/cuda/w4a16.h.
_ROWS, _HALVES, _GATED = 0, 1, 2
_ZERO_CODE = 8
_PADDING_NIBBLES = 0x44


def _pack_codes(values: Tensor, blocks: int, steps: int) -> Tensor:
    """Return ``[blocks, steps, 512]`` bytes: per lane four words, one per 32 columns.

    A lane (g, t) holds rows g and g + 8 of the kept columns 2t, 2t + 1, 2t + 8, 2t + 9. Bits 4r … 4r + 3 of a half-word
    belong to operand register r: r % 2 says which row, r / 2 which pair of columns.
    """
    codes = pad((values + _ZERO_CODE).view(torch.uint8), (0, steps * STEP // 2 - values.shape[1]), value=_ZERO_CODE)
    # [block, upper row, g, step, unit, upper columns, t, column]
    codes = codes.view(blocks, 2, 8, steps, 4, 2, 4, 2).permute(0, 3, 2, 6, 4, 7, 5, 1)
    return (codes[..., 0] | codes[..., 1] << 4).reshape(blocks, steps, -1)


def _pack_positions(positions: Tensor, blocks: int, steps: int) -> Tensor:
    """Return ``[blocks, steps, 256]`` bytes: per lane two words, each serving two units of 32 columns.

    Lanes t = 0, 1 of a quad hold the first unit of a pair, t = 2, 3 the second; each 16 columns of row g in the low
    half-word and of row g + 8 in the high one.
    """
    padded = pad(positions, (0, steps * STEP // 8 - positions.shape[1]), value=_PADDING_NIBBLES)
    # [block, upper row, g, step, pair, unit, upper columns, byte]
    padded = padded.view(blocks, 2, 8, steps, 2, 2, 2, 2).permute(0, 3, 2, 5, 6, 4, 1, 7)
    return padded.reshape(blocks, steps, -1)


def _pack_scales(scales: Tensor, blocks: int, steps: int, groups: int) -> Tensor:
    """Return ``[blocks, steps, 32 * groups]`` bytes: for each g and group the scales of rows g and g + 8."""
    padded = pad(scales, (0, steps * groups - scales.shape[1]))
    padded = padded.view(blocks, 2, 8, steps, groups).permute(0, 3, 2, 4, 1).contiguous()
    return padded.view(torch.uint8).reshape(blocks, steps, -1)


def pack_panels(values: Tensor, positions: Tensor, scales: Tensor | None, group_size: int) -> Tensor:
    """Reorder a weight into what the kernels read in one piece per step and row tile.

    Args:
        values: int8 codes -8 … 7 ``[n, k / 2]``, n a multiple of 16 and k of 32.
        positions: uint8 ``[n, k / 8]``, as in ``Sparse24Weight``.
        scales: bf16 or fp16 ``[n, k / group_size]``, or None (per channel, applied to the sums).
        group_size: 32, 64 or 128 with scales, else -1.

    Returns:
        uint8, one dimension: panels of 256 rows (fewer in the last), in each the steps of 128 columns, in each the row
        blocks of 16 rows, in each codes, positions and scales. Columns that pad k hold code 0.
    """
    n, half_k = values.shape
    blocks, steps = n // ROW_BLOCK, -(-2 * half_k // STEP)
    parts = [_pack_codes(values, blocks, steps), _pack_positions(positions, blocks, steps)]
    if scales is not None:
        parts.append(_pack_scales(scales, blocks, steps, STEP // group_size))
    packed = torch.cat(parts, dim=-1)
    whole = blocks // PANEL_BLOCKS * PANEL_BLOCKS
    panels = packed[:whole].view(-1, PANEL_BLOCKS, steps, packed.shape[-1]).transpose(1, 2)
    return torch.cat((panels.reshape(-1), packed[whole:].transpose(0, 1).reshape(-1)))


def interleave_halves(rows: Tensor) -> Tensor:
    """Return ``rows`` so that each row block has 8 of the first half's and the 8 of the second that they meet.

    Args:
        rows: ``[n, …]``, n a multiple of 16: one row per output feature.
    """
    return rows.unflatten(0, (2, -1, ROW_BLOCK // 2)).transpose(0, 1).flatten(0, 2)


def available() -> bool:
    """Return whether the current device can run this module's ops."""
    return _cuda is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """Return the number of multiprocessors and 10 * major + minor of the compute capability."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


_GRAPHS = (-1, -2)  # in place of a stream: graphs have workspaces of their own, for two streams of a graph
_workspaces: dict[tuple[int, int], Tensor] = {}
_captured: dict[tuple[int, int], int] = {}  # which of _GRAPHS a capturing stream has


def _make_workspace(device: torch.device, stream: int) -> Tensor:
    """Return the workspace of ``stream``, made or set up again: a reload may follow a sleep that lost its contents."""
    size = _cuda.w4a16_workspace_bytes(_device(device.index)[0])
    workspace = _workspaces.setdefault((device.index, stream), torch.empty(size, dtype=torch.uint8, device=device))
    workspace[:_COUNTER_BYTES].zero_()
    return workspace


def _graph_workspace(device: torch.device, stream: int) -> Tensor:
    """Return the workspace of a capturing stream: memory first asked for now would be set up by the graph alone."""
    key = (device.index, stream)
    if key not in _captured:
        taken = sum(index == device.index for index, _ in _captured)
        _captured[key] = _GRAPHS[taken if taken < len(_GRAPHS) else 0]
    return _workspaces[device.index, _captured[key]]


def _workspace(device: torch.device) -> Tensor | None:
    """Return the workspace of the current stream; None on Hopper, whose kernels need none.

    Graphs share the workspaces that ``prepare`` makes: graphs of one device must not be replayed at the same time.
    """
    if _device(device.index)[1] == 90:
        return None
    stream = torch.cuda.current_stream(device).cuda_stream
    if torch.cuda.is_current_stream_capturing():
        return _graph_workspace(device, stream)
    found = _workspaces.get((device.index, stream))
    return _make_workspace(device, stream) if found is None else found


def _launch(
    output: int,
    x: Tensor,
    weight: Tensor,
    channel_scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    group_size: int,
) -> Tensor:
    m, k = x.shape
    x = contiguous_and_aligned(x)
    y = x.new_empty((m, n // 2 if output == _GATED else n))
    workspace = _workspace(x.device)
    sm_count, capability = _device(x.device.index)
    _cuda.w4a16_linear(
        x.data_ptr(),
        weight.data_ptr(),
        0 if channel_scale is None else channel_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        m,
        n,
        k,
        group_size,
        x.dtype == torch.bfloat16,
        output,
        AUTO_KERNEL,
        0,  # slices by the sizes
        x.device.index,
        sm_count,
        capability,
        capability >= 90 and m <= MOST_OVERLAPPED_TOKENS,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return y


def _linear(*arguments: Any) -> Tensor:
    *problem, halves = arguments
    return _launch(_HALVES if halves else _ROWS, *problem)


def _linear_fake(x: Tensor, weight: Tensor, channel_scale: object, bias: object, n: int, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], n))


def _linear_silu_multiply(*problem: Any) -> Tensor:
    return _launch(_GATED, *problem)


def _linear_silu_multiply_fake(*problem: Any) -> Tensor:
    both = _linear_fake(*problem)
    return both.new_empty((both.shape[0], both.shape[1] // 2))


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? channel_scale, Tensor? bias, int n, int group_size"
define_op(f"w4a16_linear({_ARGUMENTS}, bool halves) -> Tensor", _linear, _linear_fake, "CUDA")
# silu(gate) * up of what w4a16_linear with halves returns, both rounded first and silu(gate) again (plugin/fusion.py).
define_op(
    f"w4a16_linear_silu_multiply({_ARGUMENTS}) -> Tensor", _linear_silu_multiply, _linear_silu_multiply_fake, "CUDA"
)


class CudaW4A16Kernel(Kernel):
    """Scheme w4a16 on compute capability 8.0 and later: any m, n a multiple of 16, k of 32; bf16 or fp16.

    Group scales are rounded to the activations' dtype. Packed tensors:

    - ``weight_packed`` uint8, see ``pack_panels``; of a gated layer with its halves interleaved;
    - ``channel_scale`` float32 ``[n]`` for group size -1.
    """

    name = "cuda_w4a16"
    quantizes_input = True

    def reason_against(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"runs on CUDA devices, not on {device.type}"
        if _cuda is None:
            return f"the extension module vllm_sparse._cuda is not built ({_IMPORT_ERROR})"
        if spec.scheme.name != "w4a16":
            return f"runs scheme w4a16, not {spec.scheme.name}"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"takes bfloat16 or float16 activations, not {spec.dtype}"
        if spec.n % ROW_BLOCK or spec.k % 32:
            return f"needs n a multiple of 16 and k of 32, not n={spec.n} and k={spec.k}"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
        return None

    def prepare(self, spec: LinearSpec, weight: Sparse24Weight) -> dict[str, Tensor]:
        assert weight.scales is not None  # scheme w4a16 is scaled
        grouped = weight.group_size != -1
        scales = weight.scales.to(spec.dtype) if grouped else None
        values, positions = weight.values, weight.positions
        if spec.gated:
            values, positions = interleave_halves(values), interleave_halves(positions)
            scales = None if scales is None else interleave_halves(scales)
        packed = {"weight_packed": pack_panels(values, positions, scales, weight.group_size)}
        if not grouped:
            packed["channel_scale"] = weight.scales.float().flatten()
        if weight.values.is_cuda:
            for graphs in _GRAPHS if _device(weight.values.device.index)[1] != 90 else ():
                _make_workspace(weight.values.device, graphs)
            # The kernel reads the weight before its predecessors in the stream have finished (programmatic dependent
            # launch), so whatever wrote the weight must have.
            torch.cuda.current_stream(weight.values.device).synchronize()
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
        return torch.ops.vllm_sparse.w4a16_linear(
            x, packed["weight_packed"], packed.get("channel_scale"), bias, spec.n, spec.group_size, spec.gated
        )
