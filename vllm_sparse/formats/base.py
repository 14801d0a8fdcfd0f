"""What every checkpoint format answers: which tensors a layer has on disk, and the hub weight they make."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.scheme import Scheme, int8_range
from vllm_sparse.weight import Sparse24Weight

_INTEGERS = (torch.int64, torch.int32)
Given = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a linear layer on disk, as a loader needs it.

    How it is cut, for fused layers and for tensor parallelism: along ``output_dim`` a tensor of a layer with n output
    features has ``shape[output_dim]`` entries, and the ratio r of the two is the same for every n. Output features
    a … b are the entries a*r … b*r, as long as a and b are multiples of ``output_multiple``; the parts of a fused
    layer follow each other in this way. Input features are cut along ``input_dim`` in the same way. Where a dim is
    None, every shard has the whole tensor.

    Attributes:
        name: the last part of the tensor's name; the rest is the module's.
        shape, dtype: for the layer (or the shard of it) that was asked for.
        output_dim, input_dim: the dimension along which output (input) features lie, or None.
        per_part: True for a scalar ``[1]`` that each fused part (q, k, v) has of its own. A loader stacks them into
            ``[parts]`` for ``to_weight``. On disk it may also be 0-dimensional.
        optional: True if a checkpoint may leave it out; a loader that cannot leave it out fills it with zeros.
        output_multiple, input_multiple: see above; 4 input features are the least, since a group of 2:4 stays whole.
        accepts: dtypes besides ``dtype`` that a file may have and that convert to ``dtype``.
        metadata: True for a tensor that only repeats what the others say, such as their shape. ``to_weight`` checks
            it when it is given; a loader may drop it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    output_dim: int | None = 0
    input_dim: int | None = None
    per_part: bool = False
    optional: bool = False
    output_multiple: int = 1
    input_multiple: int = 4
    accepts: tuple[torch.dtype, ...] = ()
    metadata: bool = False


class Format(ABC):
    """A published checkpoint format, configured by one checkpoint's ``quantization_config``.

    Attributes:
        name: the word used in logs and docs/formats.md.
        promises_sparse: True if every layer with a scheme is 2:4 by construction; False if ``to_weight`` finds out
            from the weights and raises NotSparseError for a layer that has to stay dense.
        shard_n, shard_k: a tensor-parallel shard's output (input) features must be a multiple of this.
        renamed: endings of tensor names (from the dot on) that other writers of the format use, and what they stand
            for: another ending, or None for a tensor that nobody needs.
        embeddings: exact names of the embedding tables stored in 8 bits (``formats.embedding``).
    """

    name: ClassVar[str]
    promises_sparse: ClassVar[bool] = True
    shard_n: ClassVar[int] = 1
    shard_k: ClassVar[int] = 4
    renamed: ClassVar[Mapping[str, str | None]] = {}
    embeddings: tuple[str, ...] = ()

    @classmethod
    @abstractmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        """Return whether ``config`` (a ``quantization_config``) says that it is this format. Never raises."""

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a matching ``config`` itself says that the weights are 2:4, so that no flag is needed."""
        return cls.promises_sparse

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Format:
        """Read the config; raise FormatError on one that is wrong."""

    @abstractmethod
    def scheme_of(self, module: str) -> Scheme | None:
        """Return the scheme of the linear layer called ``module``, or None if the format leaves it to others."""

    def symmetric_input(self, module: str) -> bool:
        """Return whether the activations of a layer that ``scheme_of`` knows have no zero point."""
        return True

    @abstractmethod
    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        """Return the tensors of a layer (or shard) with ``n`` output and ``k`` input features.

        Args:
            dtype: the model's dtype, which unquantized values and scales may have.

        Raises:
            FormatError: naming ``module``, when no layer of this size can be in this format.
        """

    @abstractmethod
    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        """Return (n, k) of a layer from the shapes of its tensors, by ``TensorSpec.name``.

        Returns:
            None if the layer is not stored in this format (its tensors are not there).

        Raises:
            FormatError: the main tensor is there, but not of a shape that any layer has.
        """

    def to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int] = (), full_k: int | None = None
    ) -> Sparse24Weight:
        """Make the hub weight from a layer's tensors.

        Args:
            module: a name by which ``scheme_of`` knows the layer: the first part's, for a fused one.
            tensors: by ``TensorSpec.name``.
            parts: output features of each part of a fused layer; a plain one has one entry or none.
            full_k: input features of the whole layer, when ``tensors`` are one shard of it along the input features.

        Raises:
            FormatError, NotSparseError: naming ``module``.
        """
        given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        n, k = self.check(module, given, parts=max(1, len(parts)))
        parts = parts or [n]
        if sum(parts) != n:
            raise FormatError(f"{module}: the tensors have {n} output features, the model {sum(parts)}")
        weight = self._to_weight(module, tensors, parts, k if full_k is None else full_k)
        weight.validate(module)
        return weight

    def check(self, module: str, given: Given, of: str | None = None, parts: int = 1) -> tuple[int, int]:
        """Check names, shapes and dtypes of a layer's tensors before their data is read; return (n, k).

        Args:
            given: shape and dtype by ``TensorSpec.name``.
            of: what the error names, if that is more than ``module``.
            parts: how many parts of a fused layer the tensors hold.

        Raises:
            FormatError: naming the layer.
        """
        size = self.features(module, {name: shape for name, (shape, _) in given.items()})
        if size is None:
            raise FormatError(f"{module}: the layer has none of the tensors of format {self.name}")
        dtypes = {dtype for _, dtype in given.values()}
        specs = self.tensors(module, *size, torch.float16 if torch.float16 in dtypes else torch.bfloat16)
        check_tensors(specs, given, of or module, parts)
        return size

    def stock_config(self) -> dict[str, Any] | None:
        """Return the ``quantization_config`` by which vLLM's own method reads the layers that this format leaves to
        others, and those that turn out not to be 2:4; None if such layers are not quantized."""
        return None

    @abstractmethod
    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        """``to_weight`` for tensors whose names, shapes and dtypes are right."""


def check_tensors(specs: Sequence[TensorSpec], given: Given, of: str, parts: int = 1) -> None:
    """Raise FormatError if a tensor is missing, or has another shape or dtype than its specification."""
    for spec in specs:
        if spec.name not in given:
            if spec.optional or spec.metadata:
                continue
            raise FormatError(f"{of}: tensor {spec.name} is missing")
        shape, dtype = list(given[spec.name][0]), given[spec.name][1]
        if spec.metadata:
            if dtype not in _INTEGERS or math.prod(shape) != math.prod(spec.shape):
                raise FormatError(f"{of}: expected {spec.name} to hold {math.prod(spec.shape)} integers")
            continue
        allowed = [[parts], []] if spec.per_part and parts == 1 else [[parts]] if spec.per_part else [list(spec.shape)]
        if dtype not in (spec.dtype, *spec.accepts) or shape not in allowed:
            raise FormatError(f"{of}: expected {spec.name} to be {spec.dtype} {allowed[0]}, got {dtype} {shape}")


def matrix(of: str, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """Return the shape of tensor ``name``, None if it is not there; raise FormatError if it is no matrix."""
    shape = shapes.get(name)
    if shape is None:
        return None
    if len(shape) != 2:
        raise FormatError(f"{of}: expected {name} to be a matrix, got shape {list(shape)}")
    return shape[0], shape[1]


def check_columns(of: str, k: int, multiple: int = 4, why: str = "2:4") -> None:
    """Raise FormatError unless ``k`` input features are a positive multiple of ``multiple``."""
    if k <= 0 or k % multiple:
        raise FormatError(f"{of}: {why} needs a multiple of {multiple} input features, got {k}")


def per_channel(scale: Tensor, parts: Sequence[int]) -> Tensor:
    """Return one scale per fused part, ``[parts]``, as one per output feature, ``[n, 1]``."""
    flat = scale.reshape(-1)
    return flat.repeat_interleave(torch.tensor(parts, device=flat.device)).unsqueeze(1)


def static_input(tensors: Mapping[str, Tensor], symmetric: bool) -> dict[str, Tensor]:
    """Return the hub's ``input_scale`` and, if not ``symmetric``, ``input_zero`` of fused parts, which share one input.

    The range of the codes is that of all parts together, so that none of them is clipped: the largest scale, or, with
    zero points, a new scale and zero point.
    """
    scales = tensors["input_scale"].float().flatten()
    if symmetric:
        return {"input_scale": scales.max().reshape(1)}
    zeros = tensors["input_zero_point"].to(torch.int32).flatten()
    if bool((scales == scales[0]).all() and (zeros == zeros[0]).all()):
        return {"input_scale": scales[:1], "input_zero": zeros[:1]}
    scale, zero = int8_range((scales * (-128 - zeros)).min(), (scales * (127 - zeros)).max())
    return {"input_scale": scale.reshape(1), "input_zero": zero.reshape(1)}
