"""Dense layers as stock vLLM and transformers load them: plain, or compressed-tensors without sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_sparse.scheme import SCHEMES, Scheme
from vllm_sparse.weight import LinearSpec

_FORMAT = {"fp8": "float-quantized", "int8": "int-quantized", "w4a16": "pack-quantized", "w8a16": "pack-quantized"}


class Quantized(Protocol):
    """What is written of a weight: a ``Sparse24Weight``, or another with the same attributes."""

    @property
    def scheme(self) -> Scheme: ...
    @property
    def scales(self) -> Tensor | None: ...
    @property
    def input_scale(self) -> Tensor | None: ...
    @property
    def input_zero(self) -> Tensor | None: ...
    def to_dense_codes(self) -> Tensor: ...


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes ``[n, k]`` into int32, lowest bits first, 2^(bits - 1) added; rows are filled up with zeros."""
    unsigned = codes.view(torch.uint8) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        unsigned = (unsigned[:, 0::2] & 15) | (unsigned[:, 1::2] << 4)
    return unsigned.contiguous().view(torch.int32)


def dense_tensors(weight: Quantized) -> dict[str, Tensor]:
    """Return the tensors of a layer, by the last part of their names; the values are the same bit by bit."""
    codes = weight.to_dense_codes()
    if weight.scales is None:
        return {"weight": codes}
    tensors = {"weight_scale": weight.scales}
    if weight.input_scale is not None:
        tensors["input_scale"] = weight.input_scale
    if weight.input_zero is not None:
        tensors["input_zero_point"] = weight.input_zero.to(torch.int8)
    if weight.scheme.activation is not None:
        return {"weight": codes} | tensors
    packed = pack_columns(codes, weight.scheme.weight_bits)
    return {"weight_packed": packed, "weight_shape": torch.tensor(codes.shape)} | tensors


def stock_config(layers: Mapping[LinearSpec, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any] | None:
    """Return the ``quantization_config``, None if nothing is quantized.

    Args:
        layers: names of the quantized layers by their kind; only scheme, group size and how inputs are quantized count.
        ignore: names of the linear layers that are not quantized.
    """
    if not layers:
        return None
    groups, formats = {}, set()
    for number, (spec, modules) in enumerate(layers.items()):
        stored_as = _FORMAT[spec.scheme.name]
        targets = ["Linear"] if len(layers) == 1 else sorted(modules)
        groups[f"group_{number}"] = _group(spec, targets) | {"format": stored_as}
        formats.add(stored_as)
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
    }


def _group(spec: LinearSpec, targets: list[str]) -> dict[str, Any]:
    kind = "float" if spec.scheme is SCHEMES["fp8"] else "int"
    grouped = spec.group_size != -1
    arguments = {"num_bits": spec.scheme.weight_bits, "type": kind, "symmetric": True}
    weights = arguments | {
        "strategy": "group" if grouped else "channel",
        "group_size": spec.group_size if grouped else None,
        "dynamic": False,
    }
    inputs = None
    if spec.scheme.activation is not None:
        inputs = arguments | {"strategy": "tensor" if spec.static_input else "token", "dynamic": not spec.static_input}
        inputs["symmetric"] = spec.symmetric_input
    return {"targets": targets, "weights": weights, "input_activations": inputs, "output_activations": None}
