"""Random 2:4 weights for the tests of the formats."""

import torch

from vllm_sparse.scheme import Scheme
from vllm_sparse.weight import Sparse24Weight

GROUPED = (-1, 32, 64, 128)


def random_codes(n: int, k: int, scheme: Scheme, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return a dense 2:4 ``[n, k]`` of ``dtype``: every zero pattern with at most two non-zeros occurs."""
    if dtype == torch.int8:
        low, high = (-8, 8) if scheme.weight_bits == 4 else (-128, 128)
        dense = torch.randint(low, high, (n, k), generator=generator).to(torch.int8)
    else:
        dense = (torch.randn(n, k, generator=generator) * 4).to(dtype)
    kept = torch.rand(n, k // 4, 4, generator=generator).argsort(-1) < torch.randint(
        0, 3, (n, k // 4, 1), generator=generator
    )
    if dtype == torch.float8_e4m3fn:
        return torch.where(kept.flatten(1), dense.view(torch.uint8), 0).view(dtype)
    return dense * kept.flatten(1)


def random_scales(n: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return positive scales ``[n, columns]``."""
    return (torch.rand(n, columns, generator=generator) * 0.02 + 0.001).to(dtype)


def random_weight(
    scheme: Scheme,
    n: int,
    k: int,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    scale_dtype: torch.dtype = torch.float32,
    group_size: int = -1,
    static_input: bool = False,
) -> Sparse24Weight:
    """Return a valid hub weight of random data."""
    generator = torch.Generator().manual_seed(seed)
    dense = random_codes(n, k, scheme, dtype or scheme.value_dtypes[0], generator)
    columns = 1 if group_size == -1 else k // group_size
    scales = random_scales(n, columns, scale_dtype, generator) if scheme.scaled else None
    input_scale = torch.rand(1, generator=generator) + 0.1 if static_input else None
    return Sparse24Weight.from_dense(dense, scheme, scales, group_size, input_scale)


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes."""
    if a is None or b is None:
        return a is b
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def same_weight(a: Sparse24Weight, b: Sparse24Weight) -> bool:
    """Return whether two hub weights are the same, bit by bit."""
    return (
        a.scheme is b.scheme
        and a.group_size == b.group_size
        and same_bits(a.values, b.values)
        and same_bits(a.positions, b.positions)
        and same_bits(a.scales, b.scales)
        and same_bits(a.input_scale, b.input_scale)
    )
