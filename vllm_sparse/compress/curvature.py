"""How errors in a layer's outputs act on the block's output, those of all outputs together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_sparse.compress.model import BlockCall
from vllm_sparse.compress.world import World


def output_curvature(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[tuple[BlockCall, Tensor]],
    sequences: int,
    seed: int,
    world: World,
) -> dict[str, Tensor]:
    """Return the Gauss-Newton matrix G of each layer's outputs, float32 ``[n, n]``: e^T G e is what an error e costs.

    What it costs is the squared error of the block's output, each token's relative to its root mean square, since a
    norm reads it next. G is the mean of J^T J over tokens, with J the derivative of the block's output by the layer's;
    one pass back with random signs in place of an error gives a sample of it.

    Args:
        block: dense.
        batches: call and input of each pass.
        sequences: to use at least, those of all processes together.
        seed: of the signs.
    """
    sums = {name: torch.zeros(m.out_features, m.out_features, device=m.weight.device) for name, m in linears.items()}
    handles = [linear.register_forward_hook(_adds_to(sums[name])) for name, linear in linears.items()]
    dice = torch.Generator(batches[0][1].device).manual_seed(seed * world.size + world.rank)
    tokens = torch.zeros(1, device=batches[0][1].device)
    seen = 0
    for call, x in batches:
        if seen * world.size >= sequences:
            break
        with torch.enable_grad():
            output = call.run(block, x.detach().requires_grad_())
            scale = output.detach().float().square().mean(-1, keepdim=True).clamp_min(1e-20).rsqrt()
            signs = torch.randint(0, 2, output.shape, generator=dice, device=output.device) * 2 - 1
            (output.float() * (signs * scale)).sum().backward()
        seen += x.shape[0]
        tokens += x.shape[0] * x.shape[1]
    for handle in handles:
        handle.remove()
    world.sum(tokens)
    return {name: world.sum(total) / tokens for name, total in sums.items()}


def _adds_to(total: Tensor) -> Callable[..., Any]:
    def count(gradient: Tensor) -> None:
        rows = gradient.flatten(0, -2).float()
        total.addmm_(rows.T, rows)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:  # no expert without tokens
            output.register_hook(count)

    return hook
