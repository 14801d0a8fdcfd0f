"""``sparse-bitmask`` of compressed-tensors: any number of non-zeros a row, which may happen to be 2:4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.base import Given, TensorSpec, check_columns, check_tensors, matrix
from vllm_sparse.formats.bitmask import BitmaskFormat
from vllm_sparse.formats.compressed_tensors import scale_specs, scales_of, with_input
from vllm_sparse.weight import Sparse24Weight, nonzero_mask

_BITS = tuple(range(8))


def dense_from_bitmask(compressed: Tensor, bitmask: Tensor, k: int, of: str) -> Tensor:
    """Return the dense ``[n, k]`` of non-zeros ``[count]`` in row-major order and their bitmask ``[n, ceil(k / 8)]``.

    Raises:
        FormatError: the bitmask marks another number of entries, or some beyond k.
    """
    shifts = torch.tensor(_BITS, dtype=torch.uint8, device=bitmask.device)
    marked = ((bitmask.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)
    if bool(marked[:, k:].any()):
        raise FormatError(f"{of}: the bitmask marks entries beyond the {k} input features")
    marked = marked[:, :k]
    if int(marked.sum()) != compressed.shape[0]:
        raise FormatError(f"{of}: the bitmask marks {int(marked.sum())} entries, there are {compressed.shape[0]}")
    dense = torch.zeros(marked.shape, dtype=torch.uint8 if compressed.itemsize == 1 else compressed.dtype)
    dense[marked] = compressed.view(dense.dtype)
    return dense.view(compressed.dtype)


@dataclass(frozen=True)
class SparseBitmaskFormat(BitmaskFormat):
    """Rows have different lengths, so that nothing can be loaded in parts: these are converted, not served."""

    name = "sparse-bitmask"
    promises_sparse = False

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return True  # nobody else reads it, and the error of this format says what to do

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        raise FormatError(
            f"{module}: a sparse-bitmask checkpoint cannot be loaded in parts; convert it once with "
            f"'vllm-sparse convert SRC -o OUT' and serve that"
        )

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        shape = matrix(module, "bitmask", shapes)
        return shape and (shape[0], 8 * shape[1])

    def check(self, module: str, given: Given, of: str | None = None, parts: int = 1) -> tuple[int, int]:
        size = self.features(module, {name: shape for name, (shape, _) in given.items()})
        if size is None:
            raise FormatError(f"{module}: the layer has none of the tensors of format {self.name}")
        n, k = size
        group = self.our_group(module)
        assert group.scheme is not None
        count = min(n * k, math.prod(given["compressed"][0])) if "compressed" in given else 0
        dtypes = group.scheme.value_dtypes
        specs = [
            TensorSpec("compressed", (count,), dtypes[0], None, accepts=dtypes),
            TensorSpec("bitmask", (n, k // 8), torch.uint8),
            TensorSpec("shape", (2,), torch.int64, None, metadata=True),
            TensorSpec("row_offsets", (n,), torch.int64, None, metadata=True),
        ]
        scales = scale_specs(group, n, k, torch.float32, module) if group.scheme.scaled else []
        check_tensors([*specs, *scales], given, of or module, parts)
        return size

    def to_dense_codes(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the dense ``[n, k]`` of a layer's checked tensors, 2:4 or not.

        Raises:
            FormatError: naming ``module``: shape, row offsets and bitmask contradict each other.
        """
        bitmask = tensors["bitmask"]
        n, k = bitmask.shape[0], 8 * bitmask.shape[1]
        if "shape" in tensors:
            shape = tensors["shape"].flatten().tolist()
            if shape[0] != n or not k - 8 < shape[1] <= k:
                raise FormatError(f"{module}: shape says {shape}, the bitmask {[n, k]}")
            k = shape[1]
        check_columns(module, k)
        dense = dense_from_bitmask(tensors["compressed"], bitmask, k, module)
        if "row_offsets" in tensors:
            counts = nonzero_mask(dense).sum(1)
            if not torch.equal(tensors["row_offsets"].flatten().long(), counts.cumsum(0) - counts):
                raise FormatError(f"{module}: row_offsets do not fit the bitmask")
        return dense

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        group, dense = self.our_group(module), self.to_dense_codes(module, tensors)
        assert group.scheme is not None
        scales = scales_of(group, tensors, parts)
        weight = Sparse24Weight.from_dense(dense, group.scheme, scales, group.group_size, layer=module)
        return with_input(weight, group, tensors, module)
