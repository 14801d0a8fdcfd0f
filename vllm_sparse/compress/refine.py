"""Fine-tuning of a block's kept weights until its output is that of the dense block."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_sparse.compress.model import BlockCall
from vllm_sparse.compress.world import World

# A step moves a weight by at most this share of the layer's root mean square at first, and by nothing at the end.
_LEARNING_RATE = 0.01
_STEPS_BEFORE_CAPTURE = 3


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
    world: World,
) -> Refinement:
    """Train the weights that ``masks`` keep with Adam; everything else stays as it is, and pruned weights stay zero.

    Args:
        block: pruned; its linear layers are changed in place, and are float32 afterwards.
        masks: bool ``[n, k]`` of each layer to train.
        batches: the call, the inputs from the compressed model, and the output of the dense block in the dense model,
            so that the errors of the blocks before are worked against as well.
        steps: one batch each.
        seed: of the order of the batches.
        world: the processes that train together, each on batches of its own: a step is one of every process.
    """
    hooks = [_train_kept(linear, mask) for linear, mask in masks.items()]
    same = len({x.shape for _, x, _ in batches}) == 1
    # Communication between processes is not captured.
    trainer = _Trainer(block, list(masks), steps, world, capture=same and batches[0][1].is_cuda and world.alone)
    rounds = world.most(len(batches), batches[0][1].device)
    losses = []
    order: list[int] = []
    shuffle = random.Random(seed)
    for _ in range(steps):
        if not order:
            order = shuffle.sample(range(rounds), rounds)
        number = order.pop()
        losses.append(trainer.step(*batches[number]) if number < len(batches) else trainer.step_without_batch())
    for hook in hooks:
        hook.remove()
    for linear in masks:
        linear.weight.requires_grad_(False)
        linear.weight.grad = None
    tenth = max(1, steps // 10)
    history = torch.stack(losses)
    return Refinement(float(history[:tenth].mean()), float(history[-tenth:].mean()))


def _train_kept(linear: nn.Linear, mask: Tensor) -> Any:
    """Make the weight of ``linear`` a float32 parameter whose gradient is zero outside ``mask``; return the hook."""
    weight = linear.weight = nn.Parameter(linear.weight.detach().float())
    return weight.register_hook(lambda gradient: gradient * mask)


class _Trainer:
    """Adam on the weights of some layers of a block, with a learning rate that falls to zero.

    A step of a small block is hundreds of kernels of microseconds each. On a GPU they are captured once, as a graph.
    """

    def __init__(self, block: nn.Module, linears: Sequence[nn.Linear], steps: int, world: World, capture: bool) -> None:
        self._block, self._steps, self._done, self._capture = block, steps, 0, capture
        self._world, self._weights = world, [linear.weight for linear in linears]
        device = linears[0].weight.device
        self._first = [_LEARNING_RATE * float(linear.weight.square().mean().sqrt()) for linear in linears]
        # Tensors where the step is captured, which would keep the value of a number.
        rates = [torch.zeros((), device=device) if capture else 0.0 for _ in linears]
        groups = [{"params": [linear.weight], "lr": rate} for linear, rate in zip(linears, rates, strict=True)]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), capturable=capture)
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, call: BlockCall, x: Tensor, target: Tensor) -> Tensor:
        """Learn from one batch; return the relative squared error before it, a tensor without dimensions."""
        self._set_rates()
        if not self._capture:
            return self._learn(call, x, target)
        if self._graph is None:
            if self._done <= _STEPS_BEFORE_CAPTURE:
                return self._learn_aside(call, x, target)
            self._x, self._target, self._graph = x.clone(), target.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._loss = self._learn(call, self._x, self._target)
        self._x.copy_(x)
        self._target.copy_(target)
        self._graph.replay()
        return self._loss.clone()

    def step_without_batch(self) -> Tensor:
        """Learn from what the other processes have, which have a batch more."""
        self._set_rates()
        nothing = torch.zeros((), device=self._weights[0].device)
        self._world.sum(nothing.clone())
        for weight in self._weights:
            weight.grad = torch.zeros_like(weight)
        return self._move(nothing)

    def _set_rates(self) -> None:
        for group, first in zip(self._optimizer.param_groups, self._first, strict=True):
            rate = first * (1 - self._done / self._steps)
            group["lr"] = group["lr"].fill_(rate) if self._capture else rate
        self._done += 1

    def _learn(self, call: BlockCall, x: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            half = x.dtype != torch.float32
            with torch.autocast(x.device.type, torch.bfloat16, enabled=half, cache_enabled=not self._capture):
                output = call.run(self._block, x)
            size = self._world.sum(target.float().square().sum())  # of the batches of all processes
            loss = (output.float() - target.float()).square().sum() / size
        self._optimizer.zero_grad()
        loss.backward()
        return self._move(loss.detach())

    def _move(self, loss: Tensor) -> Tensor:
        """Take the step that the gradients of all processes ask for together; return their losses' sum."""
        for weight in () if self._world.alone else self._weights:
            if weight.grad is None:  # an expert that no token here was sent to, but perhaps one of another process
                weight.grad = torch.zeros_like(weight)
            self._world.sum(weight.grad)
        self._optimizer.step()
        return self._world.sum(loss)

    def _learn_aside(self, call: BlockCall, x: Tensor, target: Tensor) -> Tensor:
        """Learn on another stream, as capturing wants it of the steps before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._learn(call, x, target)
        torch.cuda.current_stream().wait_stream(stream)
        return loss
