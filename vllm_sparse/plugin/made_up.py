"""Weights that no checkpoint gave: random ones for ``--load-format dummy``, and 2:4 ones quantized while loading."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_sparse.scheme import Scheme, check_group_size
from vllm_sparse.weight import LinearSpec, Sparse24Weight, pack_nibbles

_NIBBLES = (4, 8, 12, 9, 13, 14)  # the six ways to choose two of four, as position nibbles
_AMPLITUDE = 1e-3  # of dummy weights, as vLLM's own


def random_weight(spec: LinearSpec, device: torch.device) -> Sparse24Weight:
    """Return a valid random weight for ``spec``, the same one every time."""
    generator = torch.Generator(device).manual_seed(0)
    shape, scheme = (spec.n, spec.k // 2), spec.scheme
    value_dtype = scheme.value_dtypes[0]
    if scheme.scaled and not value_dtype.is_floating_point:
        largest = int(scheme.max_code)
        values = torch.randint(-largest, largest + 1, shape, generator=generator, device=device, dtype=torch.int8)
    else:
        uniform = torch.rand(shape, generator=generator, device=device) * 2 - 1
        values = (uniform * (scheme.max_code if scheme.scaled else _AMPLITUDE)).to(value_dtype)
    choice = torch.randint(0, 6, (spec.n, spec.k // 4), generator=generator, device=device)
    positions = pack_nibbles(torch.tensor(_NIBBLES, dtype=torch.uint8, device=device)[choice])
    scales = None
    if scheme.scaled:
        groups = 1 if spec.group_size == -1 else spec.k // spec.group_size
        scales = torch.full(
            (spec.n, groups), _AMPLITUDE / scheme.max_code, dtype=spec.scale_dtype or torch.float32, device=device
        )
    input_scale = torch.ones(1, device=device) if spec.static_input else None
    input_zero = None
    if spec.static_input and not spec.symmetric_input:
        input_zero = torch.zeros(1, dtype=torch.int32, device=device)
    return Sparse24Weight(
        scheme,
        values,
        positions,
        scales,
        spec.group_size,
        input_scale,
        symmetric_input=spec.symmetric_input,
        input_zero=input_zero,
    )


def quantize_at_load(weight: Sparse24Weight, scheme: Scheme, layer: str) -> Sparse24Weight:
    """Return an unquantized ``weight`` rounded to nearest in ``scheme``, in groups of 128 where they fit."""
    if weight.scheme == scheme:
        return weight
    group_size = 128 if scheme.grouped and weight.k % 128 == 0 else -1
    check_group_size(scheme, group_size, weight.k, layer)
    groups = 1 if group_size == -1 else weight.k // group_size
    kept = weight.values.float().unflatten(1, (groups, -1))
    scales = kept.abs().amax(-1) / scheme.max_code
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = (kept / scales.unsqueeze(-1)).clamp(-scheme.max_code, scheme.max_code).flatten(1)
    value_dtype = scheme.value_dtypes[0]
    codes = codes if value_dtype.is_floating_point else codes.round()
    return replace(weight, scheme=scheme, values=codes.to(value_dtype), scales=scales, group_size=group_size)
