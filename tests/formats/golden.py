"""Layers that are the same on every machine and torch version, and the formats an oracle stored them in.

``tests/formats/oracle.py`` writes the files in ``tests/formats/golden`` from them, with compressed-tensors 0.14.0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """A layer ``[n, k]`` of codes of ``dtype``, and how it is quantized and stored."""

    name: str
    format: str  # compressed-tensors' name of it
    n: int
    k: int
    bits: int
    dtype: torch.dtype = torch.int8
    group_size: int = -1  # -1: one scale per output feature, 0: per tensor
    symmetric: bool = True
    two_of_four: bool = True
    weight_only: bool = False  # of the formats that also quantize activations


CASES = (
    Case("bitmask-bf16", "sparse-24-bitmask", 6, 24, 16, torch.bfloat16),
    Case("bitmask-fp16-odd", "sparse-24-bitmask", 3, 20, 16, torch.float16),
    Case("bitmask-fp8", "sparse-24-bitmask", 5, 40, 8, torch.float8_e4m3fn),
    Case("bitmask-fp8-tensor", "sparse-24-bitmask", 4, 16, 8, torch.float8_e4m3fn, group_size=0),
    Case("bitmask-int8", "sparse-24-bitmask", 7, 32, 8),
    Case("legacy-bf16", "sparse-bitmask", 4, 20, 16, torch.bfloat16),
    Case("legacy-bf16-unstructured", "sparse-bitmask", 4, 16, 16, torch.bfloat16, two_of_four=False),
    Case("legacy-int8", "sparse-bitmask", 5, 24, 8),
    Case("legacy-fp8", "sparse-bitmask", 4, 16, 8, torch.float8_e4m3fn),
    Case("marlin-4bit-channel", "marlin-24", 64, 64, 4),
    Case("marlin-4bit-channel-wide", "marlin-24", 192, 96, 4),
    Case("marlin-8bit-channel", "marlin-24", 128, 32, 8),
    Case("marlin-4bit-g128-k128", "marlin-24", 64, 128, 4, group_size=128),
    Case("marlin-4bit-g128-k256", "marlin-24", 64, 256, 4, group_size=128),
    Case("marlin-4bit-g128-k384", "marlin-24", 64, 384, 4, group_size=128),
    Case("marlin-8bit-g128-k384", "marlin-24", 64, 384, 8, group_size=128),
    Case("packed-4bit-g32", "pack-quantized", 8, 64, 4, group_size=32),
    Case("packed-4bit-channel", "pack-quantized", 6, 24, 4),
    Case("packed-4bit-g32-asymmetric", "pack-quantized", 16, 64, 4, group_size=32, symmetric=False),
    Case("packed-4bit-channel-asymmetric", "pack-quantized", 8, 16, 4, symmetric=False),
    Case("packed-8bit-g64", "pack-quantized", 5, 128, 8, group_size=64),
    Case("quantized-fp8-channel", "float-quantized", 6, 16, 8, torch.float8_e4m3fn),
    Case("quantized-int8-tensor", "int-quantized", 6, 16, 8, group_size=0),
    Case("quantized-w8a16-g32", "int-quantized", 6, 64, 8, group_size=32, weight_only=True),
)


def _noise(count: int, salt: int) -> torch.Tensor:
    """Return ``count`` integers 0 … 2^15 - 1 that look random, by integer arithmetic alone."""
    x = torch.arange(count, dtype=torch.int64) * 2654435761 + salt * 40503 + 12345
    for _ in range(3):
        x = ((x ^ (x >> 15)) * 2246822519) & 0xFFFFFFFF
    return (x >> 8) & 0x7FFF


def layer(case: Case) -> dict[str, torch.Tensor]:
    """Return ``codes`` ``[n, k]``, ``scales`` float16 (absent for 16 bits) and, if asymmetric, ``zeros`` int8.

    Codes are less their zero points. Scales have three bits of mantissa, so that code times scale is exact in fp16.
    """
    n, k, salt = case.n, case.k, sum(map(ord, case.name))
    kept = (
        _noise(n * k, salt + 1).reshape(n, k // 4, 4).argsort(-1) < _noise(n * k // 4, salt + 2).reshape(n, -1, 1) % 3
    )
    if not case.two_of_four:
        kept = _noise(n * k, salt + 3).reshape(n, k // 4, 4) % 2 == 0
    kept = kept.flatten(1)
    if case.dtype != torch.int8:
        numbers = (_noise(n * k, salt).reshape(n, k) % 255 - 127).float() / 32
        return {"codes": torch.where(kept, numbers, 0).to(case.dtype)} | _scales(case, salt)
    half = 1 << (case.bits - 1)
    codes = _noise(n * k, salt).reshape(n, k) % (2 * half) - half
    extra = {}
    if not case.symmetric:
        columns = 1 if case.group_size == -1 else k // case.group_size
        zeros = _noise(n * columns, salt + 4).reshape(n, columns) % (2 * half) - half
        codes = (codes.unflatten(1, (columns, -1)) - zeros.unsqueeze(-1)).flatten(1)
        extra["zeros"] = zeros.to(torch.int8)
    return {"codes": torch.where(kept, codes, 0).to(torch.int8)} | extra | _scales(case, salt)


def _scales(case: Case, salt: int) -> dict[str, torch.Tensor]:
    if case.bits == 16:
        return {}
    shape = (1,) if case.group_size == 0 else (case.n, 1 if case.group_size == -1 else case.k // case.group_size)
    noise = _noise(torch.Size(shape).numel(), salt + 5).reshape(shape)
    return {"scales": ((1 + noise % 4 / 4) * 2.0 ** (-4 - noise // 4 % 4)).half()}


def config(case: Case) -> dict:
    """Return the ``quantization_config`` that goes with it."""
    strategy = {-1: "channel", 0: "tensor"}.get(case.group_size, "group")
    weights = {
        "num_bits": case.bits,
        "type": "float" if case.dtype == torch.float8_e4m3fn else "int",
        "strategy": strategy,
        "group_size": case.group_size if case.group_size > 0 else None,
        "symmetric": case.symmetric,
        "dynamic": False,
    }
    inputs = None
    activations = case.format in ("float-quantized", "int-quantized") or (case.bits == 8 and "bitmask" in case.format)
    if activations and not case.weight_only:
        inputs = {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True, "symmetric": True}
    made: dict = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "quantization_status": "compressed"}
    if case.bits != 16:
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
        made["config_groups"] = {"group_0": group}
        made["format"] = case.format
    if "bitmask" in case.format:
        made["format"] = (
            "dense" if case.bits == 16 else "int-quantized" if case.dtype == torch.int8 else "float-quantized"
        )
        structure = "2:4" if case.format == "sparse-24-bitmask" else "unstructured"
        made["sparsity_config"] = {
            "format": case.format,
            "sparsity_structure": structure,
            "targets": ["Linear"],
            "ignore": ["lm_head"],
            "global_sparsity": 0.5,
            "registry_requires_subclass": False,
        }
    elif case.format == "marlin-24":
        made["sparsity_config"] = {"format": "dense", "sparsity_structure": "unstructured", "global_sparsity": 44.57}
    return made
