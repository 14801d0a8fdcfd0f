"""SmoothQuant (Xiao et al., arXiv 2211.10438): large activations move from a norm into the layers that follow it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vllm_sparse.compress.model import BlockCall
from vllm_sparse.compress.world import World

_SMALLEST = 1e-5  # of a scale, as in the paper's code


@dataclass
class _Norm:
    """What was seen of one norm: an input and what it made of it, who reads that, and its largest entry by channel."""

    module: Any
    x: Tensor
    y: Tensor
    largest: Tensor
    readers: dict[str, nn.Linear] = field(default_factory=dict)


def smooth(
    block: nn.Module,
    prefix: str,
    linears: Iterable[nn.Linear],
    batches: Sequence[tuple[BlockCall, Tensor]],
    strength: float,
    world: World | None = None,
) -> dict[str, Tensor]:
    """Divide what each norm of ``block`` puts out by a scale per channel, and multiply it into the linear layers after.

    The block computes what it did before: scales are powers of two, and a norm whose output somebody else reads as
    well (seen by the block's output) is left alone. Which layers follow which norm is seen in the forward pass.

    Args:
        prefix: of the block in the model, with its dot.
        linears: those that will be quantized; norms that none of them reads are left alone.
        batches: inputs, and how the block is called.
        strength: 0 moves nothing, 1 all of it: s = max|x|^strength / max|w|^(1 - strength), equation 4.

        world: other processes, which have other batches.

    Returns:
        Every parameter that changed, by its name in the model.
    """
    world = world or World()
    wanted = {id(linear) for linear in linears}
    norms = _watch(block, batches)
    call, x = batches[0]
    before = call.run(block, x)
    changed: set[int] = set()
    for norm in norms.values():
        if not any(id(linear) in wanted for linear in norm.readers.values()):
            continue
        parameters = [*norm.module.parameters(recurse=False), *(linear.weight for linear in norm.readers.values())]
        saved = [parameter.clone() for parameter in parameters]
        world.largest(norm.largest)
        if world.agree(_migrate(norm, strength) and _same(call.run(block, x), before), x.device):
            changed |= {id(parameter) for parameter in parameters}
            continue
        for parameter, old in zip(parameters, saved, strict=True):
            parameter.copy_(old)
    return {prefix + name: value for name, value in block.named_parameters() if id(value) in changed}


def _watch(block: nn.Module, batches: Sequence[tuple[BlockCall, Tensor]]) -> dict[str, _Norm]:
    """Return the norms whose output at least one linear layer reads, by name."""
    norms: dict[str, _Norm] = {}
    outputs: dict[int, tuple[Tensor, str]] = {}

    def after_norm(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
                return
            largest = output.abs().flatten(0, -2).amax(0).float()
            if name in norms:
                norms[name].largest = torch.maximum(norms[name].largest, largest)
            else:
                some = args[0].flatten(0, -2)[:16].clone()
                norms[name] = _Norm(module, some, output.flatten(0, -2)[:16].clone(), largest)
            outputs[id(output)] = output, name  # held, so that its id stays its own

        return hook

    def before_linear(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            if id(args[0]) in outputs:
                norms[outputs[id(args[0])][1]].readers[name] = module

        return hook

    hooks = []
    for name, module in block.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(before_linear(name)))
        elif weight is not None and weight.dim() == 1:
            hooks.append(module.register_forward_hook(after_norm(name)))
    with _removed(hooks):
        for call, x in batches:
            call.run(block, x)
            outputs.clear()
    return {name: norm for name, norm in norms.items() if norm.readers}


def _migrate(norm: _Norm, strength: float) -> bool:
    """Move scales from ``norm`` into its readers; return whether the norm then puts out what it should."""
    weights = torch.stack([linear.weight.abs().amax(0).float() for linear in norm.readers.values()]).amax(0)
    scale = norm.largest.pow(strength) / weights.clamp_min(_SMALLEST).pow(1 - strength)
    scale = torch.where(norm.largest > 0, scale.clamp_min(_SMALLEST), 1.0)
    scale = torch.exp2((scale / scale.log().mean().exp()).log2().round())
    gain, offset = norm.module.weight, float(_adds_one(norm))
    new = ((gain.float() + offset) / scale - offset).to(gain.dtype)
    kept = new.float() + offset == 0  # nothing that could be divided
    new = torch.where(kept, gain, new)
    scale = torch.where(kept, 1.0, (gain.float() + offset) / (new.float() + offset))  # of what could be stored
    gain.copy_(new)
    if getattr(norm.module, "bias", None) is not None:
        norm.module.bias.div_(scale)
    for linear in norm.readers.values():
        linear.weight.mul_(scale)
    return _same(norm.module(norm.x).float() * scale, norm.y)


def _adds_one(norm: _Norm) -> bool:
    """Return whether the norm multiplies by its weight plus one, as Gemma's do: so one of -1 silences it."""
    old = norm.module.weight.clone()
    norm.module.weight.fill_(-1)
    bias = getattr(norm.module, "bias", None)
    silent = bool((norm.module(norm.x) == (0 if bias is None else bias)).all())
    norm.module.weight.copy_(old)
    return silent


def _same(found: Tensor, wanted: Tensor) -> bool:
    tolerance = 1e-5 if wanted.dtype == torch.float32 else 1e-2
    return float((found.float() - wanted.float()).norm()) <= tolerance * float(wanted.float().norm())


@contextmanager
def _removed(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
