"""Plain torch on any device: decompress, then multiply in float32. The yardstick of every other kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_sparse.kernels.base import Kernel, define_op
from vllm_sparse.scheme import get_scheme, int8_range
from vllm_sparse.weight import LinearSpec, Sparse24Weight


def quantize_activations(x: Tensor, dtype: torch.dtype, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` ``[m, k]`` symmetrically to int8 or e4m3 codes.

    Args:
        static_scale: float32 ``[1]`` for all tokens, or None for one scale per token, max|x| / largest code.

    Returns:
        codes ``[m, k]`` and float32 scales ``[m, 1]`` (``[1]`` when static).
    """
    largest = 127.0 if dtype == torch.int8 else 448.0
    wide = x.float()
    if static_scale is None:
        scale = wide.abs().amax(-1, keepdim=True) / largest if x.shape[1] else wide.new_ones(x.shape[0], 1)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    else:
        scale = static_scale.float()
    codes = (wide / scale).clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def quantize_asymmetric(
    x: Tensor, static_scale: Tensor | None, static_zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize ``x`` ``[m, k]`` to int8 codes with a zero point: x is about (code - zero point) * scale.

    Args:
        static_scale, static_zero: float32 and int32 ``[1]`` for all tokens, or None: then the range of each token's
            values and zero is spread over all 256 codes, so that zero itself has one.

    Returns:
        codes ``[m, k]``, float32 scales and int32 zero points ``[m, 1]`` (``[1]`` when static).
    """
    wide = x.float()
    if static_scale is None or static_zero is None:
        bounded = wide if x.shape[1] else wide.new_zeros(x.shape[0], 1)
        lowest, highest = bounded.amin(-1, keepdim=True).clamp(max=0), bounded.amax(-1, keepdim=True).clamp(min=0)
        scale, zero = int8_range(lowest, highest)
    else:
        scale, zero = static_scale.float(), static_zero
    return ((wide / scale).round() + zero).clamp(-128, 127).to(torch.int8), scale, zero


def _linear(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    group_size: int,
    symmetric_input: bool,
    dtype: torch.dtype,
) -> Tensor:
    weight = Sparse24Weight(get_scheme(scheme), values, positions, scales, group_size)
    activation = weight.scheme.activation
    if activation is not None and x_scale is None:
        if symmetric_input:
            x, x_scale = quantize_activations(x, activation, input_scale)
        else:
            x, x_scale, x_zero = quantize_asymmetric(x, input_scale, input_zero)
    out = (x.float() if x_zero is None else x.float() - x_zero) @ weight.to_dense(torch.float32).T
    if x_scale is not None:
        out = out * x_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype)


def _linear_fake(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    group_size: int,
    symmetric_input: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]), dtype=dtype)


define_op(
    "reference_linear(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor values, Tensor positions, Tensor? scales, "
    "Tensor? input_scale, Tensor? input_zero, Tensor? bias, str scheme, int group_size, bool symmetric_input, "
    "ScalarType dtype) -> Tensor",
    _linear,
    _linear_fake,
    "CompositeExplicitAutograd",
)


class ReferenceKernel(Kernel):
    """Runs everything, everywhere, slowly; stores the dense weight only while it multiplies."""

    name = "reference"
    quantizes_input = True

    def reason_against(self, spec: LinearSpec, device: torch.device) -> str | None:
        return None

    def prepare(self, spec: LinearSpec, weight: Sparse24Weight) -> dict[str, Tensor]:
        named = {
            "weight_packed": weight.values,
            "weight_positions": weight.positions,
            "weight_scale": weight.scales,
            "input_scale": weight.input_scale,
            "input_zero": weight.input_zero,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def apply(
        self,
        spec: LinearSpec,
        packed: Mapping[str, Tensor],
        x: Tensor,
        x_scale: Tensor | None,
        bias: Tensor | None,
        x_zero: Tensor | None = None,
    ) -> Tensor:
        return torch.ops.vllm_sparse.reference_linear(
            x,
            x_scale,
            x_zero,
            packed["weight_packed"],
            packed["weight_positions"],
            packed.get("weight_scale"),
            packed.get("input_scale"),
            packed.get("input_zero"),
            bias,
            spec.scheme.name,
            spec.group_size,
            spec.symmetric_input,
            spec.dtype,
        )
