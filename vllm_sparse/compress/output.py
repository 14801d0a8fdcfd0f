"""What a run writes for each layer it compressed: the native tensors, or dense ones that everybody loads."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.compress.pattern import Pattern
from vllm_sparse.formats.packed import unpack_columns
from vllm_sparse.formats.sparse24 import Sparse24Format
from vllm_sparse.formats.stock import dense_tensors, stock_config
from vllm_sparse.scheme import Scheme
from vllm_sparse.weight import LinearSpec, Sparse24Weight

OUTPUTS = ("sparse24", "dense")


@dataclass(frozen=True)
class DenseWeight:
    """A weight pruned to any pattern: ``Sparse24Weight`` with all its zeros in ``values`` ``[n, k]``."""

    scheme: Scheme
    values: Tensor
    scales: Tensor | None = None
    group_size: int = -1
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None

    def to(self, device: torch.device | str) -> DenseWeight:
        """Return the same weight on ``device``."""
        scales = None if self.scales is None else self.scales.to(device)
        input_scale = None if self.input_scale is None else self.input_scale.to(device)
        return replace(self, values=self.values.to(device), scales=scales, input_scale=input_scale)

    def to_dense_codes(self) -> Tensor:
        """Return the stored values."""
        return self.values

    def to_dense(self) -> Tensor:
        """Return the dequantized weight, float32 ``[n, k]``."""
        codes = self.values.float()
        if self.scales is None:
            return codes
        return (codes.unflatten(1, (self.scales.shape[1], -1)) * self.scales.float().unsqueeze(-1)).flatten(1)


Weight = Sparse24Weight | DenseWeight


def make_weight(codes: Tensor, pattern: Pattern, layer: str, **rest: Any) -> Weight:
    """Return the hub weight of ``codes`` ``[n, k]``, or a dense one where the pattern is another than 2:4.

    Args:
        layer: named in errors.
        **rest: the other attributes.
    """
    if pattern.two_of_four:
        return Sparse24Weight.from_dense(codes, layer=layer, **rest)
    return DenseWeight(values=codes, **rest)


def read_dense(tensors: Mapping[str, Tensor], scheme: Scheme, group_size: int) -> DenseWeight:
    """Return the weight that ``dense_tensors`` wrote as ``tensors``."""
    if "weight" in tensors:
        codes = tensors["weight"]
    else:
        k = int(tensors["weight_shape"][1])
        unsigned = unpack_columns(tensors["weight_packed"], scheme.weight_bits)[:, :k]
        codes = (unsigned - (1 << (scheme.weight_bits - 1))).view(torch.int8)
    return DenseWeight(scheme, codes, tensors.get("weight_scale"), group_size, tensors.get("input_scale"))


class Output(ABC):
    """How layers of one scheme, group size and pattern are stored."""

    @abstractmethod
    def tensors(self, weight: Weight) -> dict[str, Tensor]:
        """Return the tensors of a layer, by the last part of their names."""

    @abstractmethod
    def read(self, layer: str, tensors: Mapping[str, Tensor]) -> Weight:
        """Return the weight that ``tensors`` were made of."""

    @abstractmethod
    def nbytes(self, layer: str, n: int, k: int) -> int:
        """Return how many bytes the tensors of a layer take."""

    @abstractmethod
    def config(self) -> dict[str, Any] | None:
        """Return the ``quantization_config``, None if the checkpoint needs none."""


@dataclass(frozen=True)
class NativeOutput(Output):
    """The native format (docs/formats.md)."""

    form: Sparse24Format

    def tensors(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, Sparse24Weight)  # the recipe has checked that the pattern is 2:4
        return self.form.from_weight(weight)

    def read(self, layer: str, tensors: Mapping[str, Tensor]) -> Weight:
        return self.form.to_weight(layer, tensors)

    def nbytes(self, layer: str, n: int, k: int) -> int:
        specs = self.form.tensors(layer, n, k, torch.bfloat16)
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)

    def config(self) -> dict[str, Any] | None:
        return self.form.to_config()


@dataclass(frozen=True)
class DenseOutput(Output):
    """Zeros and all: plain weights, or compressed-tensors, as stock vLLM and transformers load them.

    Attributes:
        spec: of the layers; n, k and dtypes of scales do not matter.
        scale_dtype: of the weight scales.
        pattern: what was pruned.
        layers: those that are compressed, as the file calls them.
        ignore: the other linear layers.
    """

    spec: LinearSpec
    scale_dtype: torch.dtype
    pattern: Pattern
    layers: Sequence[str]
    ignore: Sequence[str]

    def tensors(self, weight: Weight) -> dict[str, Tensor]:
        return {name: tensor.contiguous() for name, tensor in dense_tensors(weight).items()}

    def read(self, layer: str, tensors: Mapping[str, Tensor]) -> Weight:
        return read_dense(tensors, self.spec.scheme, self.spec.group_size)

    def nbytes(self, layer: str, n: int, k: int) -> int:
        scheme, group_size = self.spec.scheme, self.spec.group_size
        if not scheme.scaled:
            return 2 * n * k
        scales = n * (1 if group_size == -1 else k // group_size) * self.scale_dtype.itemsize
        if scheme.activation is not None:
            return n * k + scales + (4 if self.spec.static_input else 0)
        per_int = 32 // scheme.weight_bits
        return 4 * n * -(-k // per_int) + 2 * 8 + scales  # packed codes, shape, scales

    def config(self) -> dict[str, Any] | None:
        if self.spec.scheme.scaled:
            config = stock_config({self.spec: self.layers}, self.ignore)
            # Without targets vLLM and transformers pass over it, and the plugin needs no flag to take the model.
            told = {"format": "dense", "sparsity_structure": "2:4"} if self.pattern.two_of_four else None
            return config if config is None or told is None else config | {"sparsity_config": told}
        return None


def make_output(
    name: str,
    spec: LinearSpec,
    scale_dtype: torch.dtype,
    pattern: Pattern,
    layers: Sequence[str],
    ignore: Sequence[str],
    embeddings: Sequence[str] = (),
) -> Output:
    """Return the output called ``name``; the other arguments are the attributes of ``DenseOutput``.

    ``spec.dtype`` is what unquantized values are stored in, ``embeddings`` the tables in 8 bits of the native format.
    """
    if name == "dense":
        return DenseOutput(spec, scale_dtype, pattern, layers, ignore)
    value_dtype = "bfloat16" if spec.scheme.scaled else str(spec.dtype).removeprefix("torch.")
    kind = str(scale_dtype).removeprefix("torch.")
    form = Sparse24Format(
        spec.scheme, value_dtype, spec.group_size, kind, spec.static_input, tuple(ignore), embeddings=tuple(embeddings)
    )
    return NativeOutput(form)
