"""vLLM parameters that check what they load: shape, dtype, and that nothing is left out."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
)

from vllm_sparse.errors import FormatError
from vllm_sparse.formats import TensorSpec


class _Checked(BasevLLMParameter):
    """Mixed into vLLM's parameter classes, whose own checks are bare assertions, or copies that convert silently.

    Attributes:
        label: name of the tensor in messages.
        accepts: the dtypes that a file may have.
        parts: how many parts of a fused layer have to arrive.
        loaded: the parts that did; "all" for a tensor that came whole.
    """

    label: str
    accepts: tuple[torch.dtype, ...]
    parts: int
    loaded: set[Any]

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._check(loaded_weight, self._output_size() * self.tp_size, "all")
        super().load_column_parallel_weight(loaded_weight=loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._check(loaded_weight, self._output_size(), "all", split_input=True)
        super().load_row_parallel_weight(loaded_weight=loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **shard: Any) -> None:
        self._check(loaded_weight, self._on_disk(shard) * self.tp_size, shard.get("shard_id", "all"))
        super().load_merged_column_weight(loaded_weight=loaded_weight, **shard)

    def load_qkv_weight(self, loaded_weight: Tensor, **shard: Any) -> None:
        replicas = 1 if shard.get("shard_id") == "q" else shard.get("num_heads", 1)
        self._check(loaded_weight, self._on_disk(shard) * self.tp_size // replicas, shard.get("shard_id", "all"))
        super().load_qkv_weight(loaded_weight=loaded_weight, **shard)

    def load_replicated(self, loaded_weight: Tensor) -> None:
        """Load a layer that every rank holds whole."""
        if loaded_weight.dim() == 0:
            loaded_weight = loaded_weight.reshape(1)
        self._check(loaded_weight, self._output_size(), "all")
        self.data.copy_(loaded_weight)

    def _output_size(self) -> int:
        dim = getattr(self, "output_dim", None)
        return 0 if dim is None else self.data.shape[dim]

    def _on_disk(self, shard: dict[str, Any]) -> int:
        """Return how many entries one rank's shard of a part has along the output dimension."""
        return int(shard.get("shard_size", 0) // getattr(self, "packed_factor", 1))

    def _check(self, loaded: Tensor, output_size: int, part: Any, split_input: bool = False) -> None:
        want = list(self.data.shape)
        if isinstance(self, PerTensorScaleParameter):
            want = [1]
            loaded = loaded.reshape(1) if loaded.dim() == 0 else loaded
        elif getattr(self, "output_dim", None) is not None:
            want[self.output_dim] = output_size
        if split_input and getattr(self, "input_dim", None) is not None:
            want[self.input_dim] *= self.tp_size
        if list(loaded.shape) != want:
            raise FormatError(f"{self.label}: expected shape {want} in the checkpoint, got {list(loaded.shape)}")
        if loaded.dtype not in self.accepts:
            raise FormatError(f"{self.label}: expected {self.accepts[0]} in the checkpoint, got {loaded.dtype}")
        self.loaded.add(part)


class _CheckedWeight(_Checked, ModelWeightParameter):
    pass


class _CheckedPacked(_Checked, PackedvLLMParameter):
    pass


class _CheckedGroupScale(_Checked, GroupQuantScaleParameter):
    pass


class _CheckedChannelScale(_Checked, ChannelQuantScaleParameter):
    pass


class _CheckedPackedColumn(_Checked, PackedColumnParameter):
    pass


class _CheckedScalars(_Checked, PerTensorScaleParameter):
    pass


def load_replicated(param: Any, loaded_weight: Tensor) -> None:
    """Weight loader of layers that are not sharded, in place of one that asserts."""
    param.load_replicated(loaded_weight)


def take_complete(parameter: Any) -> bool:
    """Return whether every part of ``parameter`` was loaded since the last call; True for one that does not count."""
    if not isinstance(parameter, _Checked):
        return True
    complete = "all" in parameter.loaded or len(parameter.loaded) >= parameter.parts
    parameter.loaded.clear()
    return complete


def make_parameter(
    spec: TensorSpec, module: str, parts: list[int], loader: Callable[..., Any], device: str | None = None
) -> Any:
    """Return the parameter that loads the tensor ``spec`` of ``module``.

    Args:
        parts: output features of each part of the (fused) layer on this rank.
        loader: the layer's weight loader.
        device: where to allocate, None for the current default.
    """
    make = torch.zeros if spec.optional else torch.empty
    data = make((len(parts),) if spec.per_part else spec.shape, dtype=spec.dtype, device=device)
    arguments: dict[str, Any] = {"data": data, "weight_loader": loader}
    if spec.output_dim is not None and not spec.per_part:
        arguments["output_dim"] = spec.output_dim
    if spec.input_dim is not None and not spec.per_part:
        arguments["input_dim"] = spec.input_dim
    kind = _kind(spec, sum(parts))
    if kind in (_CheckedPacked, _CheckedPackedColumn):
        factor = Fraction(sum(parts), spec.shape[spec.output_dim or 0])
        arguments |= {"packed_dim": spec.output_dim, "packed_factor": factor}
    parameter = kind(**arguments)
    if not isinstance(parameter, _Checked):
        return parameter
    parameter.label = f"{module}: tensor {spec.name}"
    parameter.accepts = (spec.dtype, *spec.accepts)
    parameter.parts = len(parts)
    parameter.loaded = set()
    return parameter


def _kind(spec: TensorSpec, n: int) -> type[BasevLLMParameter]:
    if spec.per_part:
        return _CheckedScalars
    if spec.output_dim is None:  # for these vLLM's loaders insist on the very class
        return BasevLLMParameter if spec.input_dim is None else RowvLLMParameter
    one_per_output = spec.shape[spec.output_dim] == n
    if spec.input_dim is None:
        return _CheckedChannelScale if one_per_output else _CheckedPackedColumn
    if not one_per_output:
        return _CheckedPacked
    return _CheckedGroupScale if spec.name.endswith("scale") else _CheckedWeight
