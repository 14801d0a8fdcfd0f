"""What errors in a layer's outputs cost, those of all outputs together: the curvature of the model's predictions.

Two steps, so that no more than a block's matrices are ever held: the Fisher information of every block's output, from
the whole model once, and from it that of each layer's outputs, when the block's turn has come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_sparse.compress.model import BlockCall
from vllm_sparse.compress.sequences import Sequences
from vllm_sparse.compress.world import World

_TOKENS_AT_ONCE = 2048  # of whose pass through the whole model everything is kept for the way back
_DAMPENING = 1e-3


def block_fisher(
    model: nn.Module, blocks: Sequence[nn.Module], sequences: Sequences, seed: int, world: World
) -> list[Tensor]:
    """Return F, float32 ``[d, d]`` on the host, of the output of each of ``blocks``.

    F is the mean of g g^T over tokens, with g the gradient of the log likelihood of labels that the model draws itself,
    times the token's root mean square. An error e of a token's output, relative to that, moves the prediction by
    e^T F e / 2 (KL divergence).

    Args:
        model: dense, without gradients of its own.
        sequences: this process's; the others add theirs.
        seed: of the labels.
    """
    device = next(model.parameters()).device
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    sums: dict[int, Tensor] = {}
    for index, block in enumerate(blocks):
        block.register_forward_hook(_adds_relative(sums, index))
    dice = torch.Generator(device).manual_seed(seed * world.size + world.rank)
    for ids in sequences.batches(_TOKENS_AT_ONCE):
        with torch.enable_grad():
            logits = model(input_ids=ids.to(device), use_cache=False).logits.flatten(0, 1).float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=dice).squeeze(1)
            nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    tokens = world.sum(torch.tensor([float(sequences.tokens)], device=device))
    return [(world.sum(sums[index]) / tokens).cpu() for index in range(len(blocks))]


def output_curvature(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[tuple[BlockCall, Tensor]],
    fisher: Tensor,
    sequences: int,
    seed: int,
    world: World,
) -> dict[str, Tensor]:
    """Return G of each layer's outputs, float32 ``[n, n]``: an error e of them costs e^T G e.

    G is the mean of J^T F J over tokens, with J the derivative of the block's output, relative to each token's root
    mean square, by the layer's. A pass back with random signs, times a root of F, gives a sample of it.

    Args:
        block: dense.
        batches: call and input of each pass.
        fisher: F of the block's output, ``[d, d]``.
        sequences: to use at least, those of all processes together.
        seed: of the signs.
    """
    device = batches[0][1].device
    sums = {name: torch.zeros(m.out_features, m.out_features, device=device) for name, m in linears.items()}
    handles = [linear.register_forward_hook(_adds(sums[name])) for name, linear in linears.items()]
    dice = torch.Generator(device).manual_seed(seed * world.size + world.rank)
    root = _root(fisher.to(device))
    tokens = torch.zeros(1, device=device)
    seen = 0
    for call, x in batches:
        if seen * world.size >= sequences:
            break
        with torch.enable_grad():
            output = call.run(block, x.detach().requires_grad_())
            signs = torch.randint(0, 2, output.shape, generator=dice, device=device) * 2.0 - 1
            (output.float() * (signs @ root / _size(output))).sum().backward()
        seen += x.shape[0]
        tokens += x.shape[0] * x.shape[1]
    for handle in handles:
        handle.remove()
    world.sum(tokens)
    return {name: world.sum(total) / tokens for name, total in sums.items()}


def _root(fisher: Tensor) -> Tensor:
    """Return R with R^T R = ``fisher``, to which a little is added where it is singular."""
    damped = fisher.double()
    damped.diagonal().add_(_DAMPENING * float(damped.diagonal().mean()) or 1.0)
    return torch.linalg.cholesky(damped).mT.float()


def _size(x: Tensor) -> Tensor:
    """Return each token's root mean square, ``[..., 1]``."""
    return x.detach().float().square().mean(-1, keepdim=True).clamp_min(1e-20).sqrt()


def _adds(total: Tensor) -> Callable[..., Any]:
    """Return a hook that adds g^T g of a layer's output to ``total``."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: _add(total, gradient.float()))

    return hook


def _adds_relative(sums: dict[int, Tensor], index: int) -> Callable[..., Any]:
    """Return a hook that adds that of a block's output, relative to its size, to what is under ``index``."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        size, width = _size(hidden), hidden.shape[-1]
        total = sums.setdefault(index, torch.zeros(width, width, device=hidden.device))
        hidden.register_hook(lambda gradient: _add(total, gradient.float() * size))

    return hook


def _add(total: Tensor, gradient: Tensor) -> None:
    rows = gradient.flatten(0, -2)
    total.addmm_(rows.T, rows)
