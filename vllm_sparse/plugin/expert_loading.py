"""Loading experts: the tensors that a checkpoint has for each of them, stacked into one parameter of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vllm_sparse.errors import FormatError
from vllm_sparse.formats import TensorSpec

# vLLM's projections, and what it calls the parts that a checkpoint stores of each.
PARTS = {"w13": ("w1", "w3"), "w2": ("w2",)}


class ExpertTensor:
    """One tensor of a projection of all experts of a layer, ``[experts, *spec.shape]``.

    Args:
        projection: "w13" or "w2".
        spec: the tensor of one expert on this rank, parts fused.
        module: name of the layer in messages.
        parts: output features of each part on this rank.
        accepts: dtypes that a file may have besides those of ``spec``.
        layer: vLLM's RoutedExperts.
    """

    def __init__(
        self,
        projection: str,
        spec: TensorSpec,
        module: str,
        parts: Sequence[int],
        accepts: tuple[torch.dtype, ...],
        layer: Any,
    ) -> None:
        self.spec = spec
        self.attribute = f"{projection}_{spec.name}"
        self._module = module
        self._shards = PARTS[projection]
        self._parts = tuple(parts)
        self._accepts = (spec.dtype, *spec.accepts, *accepts)
        self._count = layer.moe_config.num_local_experts
        self._local_expert = layer._map_global_expert_id_to_local_expert_id
        parallel = layer.moe_config.moe_parallel_config
        self._rank, self._ranks = parallel.tp_rank, parallel.tp_size
        self._loaded: set[tuple[int, str]] = set()

    def parameter(self, device: str | None) -> Parameter:
        """Return the parameter that loads this tensor, on ``device`` or the model's."""
        shape = (len(self._parts),) if self.spec.per_part else self.spec.shape
        make = torch.zeros if self.spec.optional else torch.empty
        made = Parameter(make(self._count, *shape, dtype=self.spec.dtype, device=device), requires_grad=False)
        made.weight_loader = self.load  # type: ignore[attr-defined]
        return made

    def load(
        self,
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copy this rank's share of one part of one expert, as vLLM's model loaders ask for it.

        Raises:
            FormatError: the tensor has not the shape or dtype that the format says.
        """
        expert = self._local_expert(expert_id)
        if expert == -1:  # another rank's
            return False if return_success else None
        part = self._shards.index(shard_id)
        target = param.data[expert]
        if self.spec.per_part:
            loaded_weight, target = loaded_weight.reshape(-1), target[part : part + 1]
        elif self.spec.output_dim is not None:
            size = target.shape[self.spec.output_dim] // len(self._parts)
            target = target.narrow(self.spec.output_dim, size * part, size)
        share = self._share(loaded_weight, list(target.shape), f"{self._module}: expert {expert_id}, {weight_name}")
        target.copy_(share)
        self._loaded.add((expert, shard_id))
        return True if return_success else None

    def take(self, layer: Any) -> Tensor | None:
        """Return what was loaded since the last call; None if it is optional and not all there.

        Raises:
            FormatError: naming an expert that the checkpoint has no such tensor for.
        """
        wanted = {(expert, shard) for expert in range(self._count) for shard in self._shards}
        missing, self._loaded = wanted - self._loaded, set()
        if not missing:
            return layer.get_parameter(self.attribute).data
        if self.spec.optional:
            return None
        expert, shard = min(missing)
        raise FormatError(
            f"{self._module}: tensor {self.spec.name} of expert {expert} ({shard}) is not in the checkpoint; a shard "
            f"is missing, or the config does not describe the file"
        )

    def _share(self, loaded: Tensor, shape: list[int], of: str) -> Tensor:
        """Return the part of a tensor on disk that belongs to this rank, whose target has ``shape``."""
        cut = self.spec.output_dim if len(self._shards) == 2 else self.spec.input_dim
        cut = None if self.spec.per_part else cut
        want = [size * self._ranks if dim == cut else size for dim, size in enumerate(shape)]
        if list(loaded.shape) != want:
            raise FormatError(f"{of}: expected shape {want} in the checkpoint, got {list(loaded.shape)}")
        if loaded.dtype not in self._accepts:
            raise FormatError(f"{of}: expected {self.spec.dtype} in the checkpoint, got {loaded.dtype}")
        return loaded if cut is None else loaded.narrow(cut, shape[cut] * self._rank, shape[cut])
