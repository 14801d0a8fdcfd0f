"""``sparse-24-bitmask`` of compressed-tensors 0.9 to 0.14: two kept values per group, and one bit per weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.base import TensorSpec, check_columns, matrix
from vllm_sparse.formats.compressed_tensors import (
    CompressedTensorsFormat,
    Group,
    cleaned,
    is_compressed_tensors,
    read_groups,
    scale_specs,
    scales_of,
    sparsity,
    with_input,
)
from vllm_sparse.formats.names import is_ignored, names_in
from vllm_sparse.scheme import SCHEMES, Scheme
from vllm_sparse.weight import POSITIONS_OF_MASK, Sparse24Weight, pack_nibbles, unpack_nibbles

_PAIRS = (3, 5, 6, 9, 10, 12)  # masks of four with two bits set
_NOT_A_PAIR = 0  # no valid pair of positions: marks the other masks in the table


def positions_from_bitmask(bitmask: Tensor, k: int, of: str) -> Tensor:
    """Return the hub's packed positions for a bitmask ``[n, ceil(k / 8)]``, bit i of byte j for column 8j + i.

    Raises:
        FormatError: some group of four does not have exactly two bits set, or bits beyond k are set.
    """
    table = [POSITIONS_OF_MASK[mask] if mask in _PAIRS else _NOT_A_PAIR for mask in range(16)]
    nibbles = torch.tensor(table, dtype=torch.uint8, device=bitmask.device)[unpack_nibbles(bitmask, k // 4).int()]
    if bad := int((nibbles == _NOT_A_PAIR).sum()):
        raise FormatError(f"{of}: the bitmask of {bad} groups of four does not mark exactly two entries")
    if k % 8 and bool((bitmask[:, -1] >> 4).any()):
        raise FormatError(f"{of}: the bitmask marks entries beyond the {k} input features")
    return pack_nibbles(nibbles)


@dataclass(frozen=True)
class BitmaskFormat(CompressedTensorsFormat):
    """The ``sparsity_config`` says which layers are compressed, ``config_groups`` how they are quantized, if at all."""

    sparse_targets: tuple[str, ...] = ()
    sparse_ignore: tuple[str, ...] = ()

    name = "sparse-24-bitmask"
    shard_k = 8
    renamed = {
        ".weight.compressed": ".compressed",
        ".weight.bitmask": ".bitmask",
        ".weight.shape": ".shape",
        ".weight.row_offsets": ".row_offsets",
        ".shape": None,
    }

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        return is_compressed_tensors(config) and sparsity(config).get("format") == cls.name

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BitmaskFormat:
        found = sparsity(config)
        targets = names_in(found.get("targets"), "targets of sparsity_config")
        return cls(
            read_groups(config),
            names_in(config.get("ignore"), "ignore"),
            cleaned(config),
            targets or ("Linear",),
            names_in(found.get("ignore"), "ignore of sparsity_config"),
        )

    def stock_config(self) -> dict[str, Any] | None:
        return dict(self.stock) if self.groups else None

    def group_of(self, module: str) -> Group | None:
        if is_ignored(module, self.sparse_ignore):
            return None
        if "Linear" not in self.sparse_targets and not is_ignored(module, self.sparse_targets):
            return None
        group = super().group_of(module) or Group((), SCHEMES["bf16"])
        if group.scheme is None:
            raise FormatError(f"{module}: stored as {self.name}, but quantized in a way that no 2:4 scheme has")
        return group

    def scheme_of(self, module: str) -> Scheme | None:
        scheme = super().scheme_of(module)
        return None if scheme is None or scheme.weight_bits == 4 else scheme

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        check_columns(module, k)
        group = self.our_group(module)
        assert group.scheme is not None
        value_dtype = group.scheme.value_dtypes[0] if group.scheme.scaled else dtype
        also = () if group.scheme.scaled else group.scheme.value_dtypes  # a model may run in another dtype than its own
        specs = [
            TensorSpec("compressed", (n, k // 2), value_dtype, 0, 1, accepts=also),
            TensorSpec("bitmask", (n, -(-k // 8)), torch.uint8, 0, 1, input_multiple=8),
            TensorSpec("shape", (2, 1), torch.int64, None, None, metadata=True),
        ]
        return (*specs, *(scale_specs(group, n, k, dtype, module) if group.scheme.scaled else ()))

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        shape = matrix(module, "compressed", shapes)
        return shape and (shape[0], 2 * shape[1])

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        group, values = self.our_group(module), tensors["compressed"]
        n, k = values.shape[0], 2 * values.shape[1]
        if "shape" in tensors and tensors["shape"].flatten().tolist() != [n, k]:
            raise FormatError(f"{module}: shape says {tensors['shape'].flatten().tolist()}, the tensors {[n, k]}")
        assert group.scheme is not None
        scales = scales_of(group, tensors, parts)
        positions = positions_from_bitmask(tensors["bitmask"], k, module)
        weight = Sparse24Weight(group.scheme, values, positions, scales, group.group_size, layer=module)
        return with_input(weight, group, tensors, module)
