"""2:4 on x86 and any other CPU: panels of the kept weights select the activations they multiply (csrc/cpu)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_sparse import native
from vllm_sparse.kernels.base import Kernel, define_op
from vllm_sparse.native import pointer, tier
from vllm_sparse.weight import LinearSpec, Sparse24Weight

_DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# int32 sums of u8 x s8 products, half of k of them, hold this many input features.
_MAX_INT8_K = 2 * (2**31 // (255 * 128))
# The fp8 kernels widen e4m3 by moving its bits, which divides by 2^8 (the distance of the exponents' biases).
_FP8_SCALE = 256.0


@functools.cache
def _dtype(dtype: torch.dtype) -> Any:
    return getattr(native.cpu.Dtype, _DTYPE_NAMES[dtype])


@functools.cache
def _format(name: str, panel_dtype: torch.dtype) -> Any:
    return native.cpu.Format.fp16 if panel_dtype == torch.float16 else getattr(native.cpu.Format, name)


def _by_stripe(scales: Tensor) -> Tensor:
    """Lay ``[n, groups]`` out as ``[stripes, groups, 16]``, zeros for the channels that pad n."""
    channels: int = native.cpu.CHANNELS
    padded = torch.nn.functional.pad(scales, (0, 0, 0, -scales.shape[0] % channels))
    return padded.unflatten(0, (-1, channels)).transpose(1, 2).contiguous()


def _linear(
    x: Tensor,
    panels: Tensor,
    group_scales: Tensor | None,
    channel_scales: Tensor | None,
    sums: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    bias: Tensor | None,
    panel_format: str,
    n: int,
    group_size: int,
    symmetric_input: bool,
) -> Tensor:
    m, k = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty((m, n))
    native.cpu.linear(
        tier(),
        _format(panel_format, panels.dtype),
        n,
        k,
        max(group_size, 0),
        panels.data_ptr(),
        pointer(group_scales),
        _dtype(torch.float32 if group_scales is None else group_scales.dtype),
        pointer(channel_scales),
        pointer(sums),
        x.data_ptr(),
        _dtype(x.dtype),
        m,
        x.stride(0),
        pointer(input_scale),
        pointer(input_zero),
        symmetric_input,
        y.data_ptr(),
        pointer(bias),
    )
    return y


def _linear_fake(
    x: Tensor,
    panels: Tensor,
    group_scales: Tensor | None,
    channel_scales: Tensor | None,
    sums: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    bias: Tensor | None,
    panel_format: str,
    n: int,
    group_size: int,
    symmetric_input: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], n))


define_op(
    "cpu_linear(Tensor x, Tensor panels, Tensor? group_scales, Tensor? channel_scales, Tensor? sums, "
    "Tensor? input_scale, Tensor? input_zero, Tensor? bias, str panel_format, int n, int group_size, "
    "bool symmetric_input) -> Tensor",
    _linear,
    _linear_fake,
    "CPU",
)


class CpuKernel(Kernel):
    """Every scheme, any m, any n, k a multiple of 4, from the packed weight alone.

    Activations of the W8A8 schemes are quantized inside, per token or by the static scale, as
    ``quantize_activations`` and ``quantize_asymmetric`` in reference.py define it; int8 products are exact. Packed
    tensors:

    - ``panels`` ``[stripes, panels, bytes]`` (see csrc/cpu/panel.h), uint8; for scheme bf16 seen as the values' dtype,
      bf16 or fp16, which tells the two apart;
    - ``group_scales`` ``[stripes, groups, 16]`` in their own dtype, or ``channel_scales`` float32 ``[stripes * 16]``;
    - ``sums`` ``[stripes * 16]``, only where activations become int8: what an activation of 1 everywhere gives;
    - ``input_scale`` float32 ``[1]`` for static activations, ``input_zero`` int32 ``[1]`` if those have a zero point.
    """

    name = "cpu"
    quantizes_input = True

    def reason_against(self, spec: LinearSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        if native.cpu is None:
            return f"the extension module vllm_sparse._cpu is not built ({native.IMPORT_ERROR})"
        if spec.dtype not in _DTYPE_NAMES:
            return f"takes float32, bfloat16 and float16 activations, not {spec.dtype}"
        if self._panel_format(spec) in ("int8", "w4a8") and spec.k > _MAX_INT8_K:
            return f"int8 sums are exact up to {_MAX_INT8_K} input features, not for {spec.k}"
        return None

    def prepare(self, spec: LinearSpec, weight: Sparse24Weight) -> dict[str, Tensor]:
        n, k = weight.n, weight.k
        panel_format = self._panel_format(spec)
        code = _format(panel_format, weight.values.dtype)
        values, positions = weight.values.contiguous(), weight.positions.contiguous()
        stripes, columns = -(-n // native.cpu.CHANNELS), -(-k // native.cpu.COLUMNS)
        panels = torch.empty(stripes, columns, native.cpu.panel_bytes(code), dtype=torch.uint8)
        sums = torch.empty(stripes * native.cpu.CHANNELS, dtype=torch.int32)
        native.cpu.pack(code, n, k, values.data_ptr(), positions.data_ptr(), panels.data_ptr(), sums.data_ptr())
        packed = {"panels": panels if spec.scheme.scaled else panels.view(values.dtype)}
        if weight.scales is not None and weight.group_size == -1:
            scales = _by_stripe(weight.scales.float()).flatten()
            packed["channel_scales"] = scales * _FP8_SCALE if panel_format == "fp8" else scales
        elif weight.scales is not None:
            packed["group_scales"] = _by_stripe(weight.scales)
        if panel_format == "int8":
            packed["sums"] = sums
        if panel_format == "w4a8":
            packed["sums"] = _w4a8_sums(weight)
        if weight.input_scale is not None:
            packed["input_scale"] = weight.input_scale.float()
        if weight.input_zero is not None:
            packed["input_zero"] = weight.input_zero
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
        return torch.ops.vllm_sparse.cpu_linear(
            x,
            packed["panels"],
            packed.get("group_scales"),
            packed.get("channel_scales"),
            packed.get("sums"),
            packed.get("input_scale"),
            packed.get("input_zero"),
            bias,
            self._panel_format(spec),
            spec.n,
            spec.group_size,
            spec.symmetric_input,
        )

    def _panel_format(self, spec: LinearSpec) -> str:
        return spec.scheme.name


def _w4a8_sums(weight: Sparse24Weight) -> Tensor:
    """Sum each channel's kept codes, times 16 as the kernel has them and times the scale of their group if any."""
    assert weight.scales is not None
    groups = weight.values.unflatten(1, (weight.scales.shape[1], -1)).sum(-1, dtype=torch.int32).float()
    scaled = groups if weight.group_size == -1 else groups * weight.scales.float()
    return _by_stripe(16 * scaled.sum(-1, keepdim=True)).flatten()


class CpuW4A8Kernel(CpuKernel):
    """w4a16 weights with activations rounded to int8 per token: faster from two tokens on, and not exact.

    Only for those who ask for it; ``CpuKernel`` is the one that computes what the checkpoint says.
    """

    name = "cpu_w4a8"

    def reason_against(self, spec: LinearSpec, device: torch.device) -> str | None:
        if spec.scheme.name != "w4a16":
            return f"quantizes the activations of scheme w4a16, not of {spec.scheme.name}"
        return super().reason_against(spec, device)

    def _panel_format(self, spec: LinearSpec) -> str:
        return "w4a8"
