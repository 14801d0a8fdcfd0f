"""Build and load single vLLM linear layers from hub weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_sparse.formats import Sparse24Format
from vllm_sparse.plugin.made_up import quantize_at_load
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight

PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"qkv_proj": ["q", "k", "v"], "gate_up_proj": [0, 1]}


def prune_to_two_of_four(dense: Tensor) -> Tensor:
    """Return ``dense`` with the two smallest of every four along the last dimension set to zero."""
    groups = dense.unflatten(-1, (-1, 4))
    smallest = groups.abs().argsort(dim=-1, stable=True)[..., :2]
    return groups.scatter(-1, smallest, 0).flatten(-2)


def random_dense(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a random 2:4 matrix."""
    generator = torch.Generator().manual_seed(seed)
    return prune_to_two_of_four(torch.randn(n, k, generator=generator) * 0.1).to(dtype)


def random_hub(n: int, k: int, scheme: str, seed: int = 0, input_scale: float | None = None) -> Sparse24Weight:
    """Return a random hub weight; w4a16 and w8a16 in groups of 128 where they fit."""
    weight = Sparse24Weight.from_dense(random_dense(n, k, seed), SCHEMES["bf16"])
    weight = quantize_at_load(weight, SCHEMES[scheme], "weight")
    scale = None if input_scale is None else torch.tensor([input_scale])
    return Sparse24Weight(weight.scheme, weight.values, weight.positions, weight.scales, weight.group_size, scale)


def format_of(weight: Sparse24Weight, ignore: tuple[str, ...] = ()) -> Sparse24Format:
    """Return the native format that stores ``weight``."""
    return Sparse24Format(
        weight.scheme,
        group_size=weight.group_size,
        static_input=weight.input_scale is not None,
        symmetric=weight.symmetric_input,
        ignore=ignore,
    )


def load(layer: Any, tensors: dict[str, Tensor], shard: Any = None) -> None:
    """Give ``tensors`` of one part to ``layer`` as vLLM's model loaders do."""
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        if shard is None:
            parameter.weight_loader(parameter, tensor)
        else:
            parameter.weight_loader(parameter, tensor, shard)


def new_config(fmt: Sparse24Format | None) -> Any:
    """Return a Sparse24Config that knows Llama's fused layers."""
    from vllm_sparse.plugin.config import Sparse24Config

    config = Sparse24Config(fmt)
    config.packed_modules_mapping = PARTS
    return config
