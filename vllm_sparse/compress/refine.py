"""Fine-tuning of a block's kept weights until its output is that of the dense block."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_sparse.compress.model import BlockCall

# A step moves a weight by at most this share of the layer's root mean square at first, and by nothing at the end.
_LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Refinement:
    """Relative squared error of a block's output, the mean of the first tenth of the steps and of the last."""

    before: float
    after: float


def refine(
    block: nn.Module,
    masks: Mapping[nn.Linear, Tensor],
    batches: Sequence[tuple[BlockCall, Tensor, Tensor]],
    steps: int,
    seed: int,
) -> Refinement:
    """Train the weights that ``masks`` keep with Adam; everything else stays as it is, and pruned weights stay zero.

    Args:
        block: pruned; its linear layers are changed in place, and are float32 afterwards.
        masks: bool ``[n, k]`` of each layer to train.
        batches: the call, the inputs from the compressed model, and the output of the dense block in the dense model,
            so that the errors of the blocks before are worked against as well.
        steps: one batch each.
        seed: of the order of the batches.
    """
    groups, hooks = [], []
    for linear, mask in masks.items():
        weight = linear.weight = nn.Parameter(linear.weight.detach().float())
        hooks.append(weight.register_hook(lambda gradient, mask=mask: gradient * mask))
        groups.append({"params": [weight], "lr": _LEARNING_RATE * float(weight.square().mean().sqrt())})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    order: list[int] = []
    shuffle = random.Random(seed)
    for _ in range(steps):
        if not order:
            order = shuffle.sample(range(len(batches)), len(batches))
        call, x, target = batches[order.pop()]
        with torch.enable_grad():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype != torch.float32):
                output = call.run(block, x)
            loss = (output.float() - target.float()).square().sum() / target.float().square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss))
    for hook in hooks:
        hook.remove()
    for linear in masks:
        linear.weight.requires_grad_(False)
    tenth = max(1, steps // 10)
    return Refinement(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth)
