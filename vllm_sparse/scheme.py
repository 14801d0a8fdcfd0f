"""The schemes by name: what a kept weight is stored as, how it is scaled, and what the activations become."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.errors import OptionError

GROUP_SIZES = (-1, 32, 64, 128)


@dataclass(frozen=True)
class Scheme:
    """One way to store and multiply a 2:4 weight.

    Attributes:
        name: the word used everywhere: option, op, benchmark row.
        weight_bits: bits of one kept weight on disk (positions come on top: 1 bit per original weight).
        value_dtypes: dtypes that ``Sparse24Weight.values`` may have.
        scaled: whether ``Sparse24Weight.scales`` exists.
        grouped: whether scales may be given per group of input features, not only per output channel.
        activation: dtype the activations are quantized to, or None when they stay as they are.
    """

    name: str
    weight_bits: int
    value_dtypes: tuple[torch.dtype, ...]
    scaled: bool
    grouped: bool
    activation: torch.dtype | None

    @property
    def max_code(self) -> float:
        """Largest magnitude of a quantized weight (symmetric), or inf for weights that are not quantized."""
        if not self.scaled:
            return float("inf")
        if self.value_dtypes[0] == torch.float8_e4m3fn:
            return 448.0
        return float(2 ** (self.weight_bits - 1) - 1)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("bf16", 16, (torch.bfloat16, torch.float16), scaled=False, grouped=False, activation=None),
        Scheme("fp8", 8, (torch.float8_e4m3fn,), scaled=True, grouped=False, activation=torch.float8_e4m3fn),
        Scheme("int8", 8, (torch.int8,), scaled=True, grouped=False, activation=torch.int8),
        Scheme("w4a16", 4, (torch.int8,), scaled=True, grouped=True, activation=None),
        Scheme("w8a16", 8, (torch.int8,), scaled=True, grouped=True, activation=None),
    )
}


def get_scheme(name: str) -> Scheme:
    """Return the scheme called ``name``; raise OptionError listing the known ones otherwise."""
    scheme = SCHEMES.get(name) if isinstance(name, str) else None
    if scheme is None:
        raise OptionError(f"unknown scheme {name!r}: expected one of {', '.join(SCHEMES)}")
    return scheme


def check_group_size(scheme: Scheme, group_size: int, k: int, layer: str) -> None:
    """Raise OptionError unless ``group_size`` (-1: one scale per channel) fits ``scheme`` and divides ``k``."""
    if group_size not in GROUP_SIZES:
        allowed = ", ".join(map(str, GROUP_SIZES))
        raise OptionError(f"{layer}: group size {group_size} is not supported, expected one of {allowed}")
    if group_size == -1:
        return
    if not scheme.grouped:
        raise OptionError(f"{layer}: scheme {scheme.name} has per-channel scales, so group size must be -1")
    if k % group_size:
        raise OptionError(f"{layer}: group size {group_size} does not divide the {k} input features")


def int8_range(lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 scale and int32 zero point that spread ``lowest`` <= 0 … ``highest`` >= 0 over all int8 codes.

    A value is (code - zero point) * scale, so that zero itself has a code; where both ends are zero the scale is 1.
    """
    scale = (highest - lowest) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-128 - lowest / scale).round().to(torch.int32)
