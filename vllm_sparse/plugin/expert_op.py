"""The experts of a layer as one op: route tokens to experts, run the linear kernels, add up.

One op, because torch.compile cannot trace a loop whose length depends on where tokens are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vllm_sparse.kernels import KERNELS
from vllm_sparse.kernels.base import define_op
from vllm_sparse.plugin.compat import quantizer_inside_an_op
from vllm_sparse.plugin.run import run_kernel
from vllm_sparse.weight import LinearSpec

# By vLLM's names; all take gate and up and return gate' * up.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
}


@dataclass(frozen=True)
class Projection:
    """One linear layer of every expert: its description, its kernel, and the names of the kernel's packed tensors."""

    spec: LinearSpec
    kernel: str
    names: tuple[str, ...]

    def apply(self, stacked: Sequence[Tensor], expert: int, x: Tensor) -> Tensor:
        """Return ``x @ W[expert].T``; ``stacked`` are the packed tensors of all experts, in the order of ``names``."""
        kernel = next(kernel for kernel in KERNELS if kernel.name == self.kernel)
        packed = {name: tensor[expert] for name, tensor in zip(self.names, stacked, strict=True)}
        activation = self.spec.scheme.activation
        quantize = None if activation is None else quantizer_inside_an_op(activation)
        return run_kernel(kernel, self.spec, packed, x, None, quantize)


@dataclass(frozen=True)
class Experts:
    """What all experts of a layer have in common.

    Attributes:
        w13, w2: gate and up, and down.
        activation: a key of ``ACTIVATIONS``.
        weight_on_input: routing weights multiply the tokens that go in, not what comes out.
    """

    w13: Projection
    w2: Projection
    activation: str
    weight_on_input: bool

    def apply(self, w13: Sequence[Tensor], w2: Sequence[Tensor], expert: int, x: Tensor) -> Tensor:
        """Return what ``expert`` makes of tokens ``x`` ``[m, k]``."""
        gate, up = self.w13.apply(w13, expert, x).chunk(2, dim=-1)
        return self.w2.apply(w2, expert, (ACTIVATIONS[self.activation](gate) * up).contiguous())


# (expert, tokens [m, k], routing weights [m, 1]) to its float32 results times the weights.
Weighted = Callable[[int, Tensor, Tensor], Tensor]
_EXPERTS: dict[str, Experts] = {}  # an op takes tensors and strings alone


def register(experts: Experts) -> str:
    """Make ``experts`` known to the op ``torch.ops.vllm_sparse.experts``; return its name there.

    The name depends on the content alone, so that a compiled graph that holds it stays valid in another process.
    """
    name = repr(experts)
    _EXPERTS[name] = experts
    return name


def _run(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, w13: Sequence[Tensor], w2: Sequence[Tensor], name: str
) -> Tensor:
    """Return the weighted sum of the experts' results for tokens ``x`` ``[m, k]``.

    Args:
        topk_weights, topk_ids: ``[m, t]``; ids are of this rank's experts, -1 for another rank's.
        w13, w2: packed tensors of all experts, in the order of ``Projection.names``.
        name: from ``register``.
    """
    experts = _EXPERTS[name]
    tokens, count = x.to(experts.w13.spec.dtype), w2[0].shape[0]

    def weighted(expert: int, tokens: Tensor, weight: Tensor) -> Tensor:
        if experts.weight_on_input:
            return experts.apply(w13, w2, expert, tokens * weight.to(tokens.dtype)).float()
        return experts.apply(w13, w2, expert, tokens).float() * weight

    out = x.new_zeros(x.shape[0], experts.w2.spec.n, dtype=torch.float32)
    run = _run_all if x.is_cuda and torch.cuda.is_current_stream_capturing() else _run_chosen
    run(weighted, count, tokens, topk_weights.float(), topk_ids, out)
    return out.to(x.dtype)


def _run_chosen(weighted: Weighted, count: int, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor) -> None:
    """Run each expert on the tokens sent to it alone. Waits for the device, which has to say which those are."""
    ids, order = topk_ids.flatten().long().sort()
    first, sizes = int((ids < 0).sum()), torch.bincount(ids.clamp(min=0), minlength=count).tolist()
    sizes[0] -= first
    for expert, size in enumerate(sizes):
        chosen, first = order[first : first + size], first + size
        if size == 0:
            continue
        rows = chosen // topk_ids.shape[1]
        out.index_add_(0, rows, weighted(expert, x[rows], topk_weights.flatten()[chosen].unsqueeze(1)))


def _run_all(weighted: Weighted, count: int, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor) -> None:
    """Run every expert on every token: in a CUDA graph the same kernels run wherever tokens are sent."""
    ids = torch.where(topk_ids < 0, count, topk_ids).long()
    weights = x.new_zeros(x.shape[0], count + 1, dtype=torch.float32).scatter_add_(1, ids, topk_weights)
    for expert in range(count):
        weight = weights[:, expert : expert + 1]
        out += torch.where(weight != 0, weighted(expert, x, weight), 0)  # other tokens' results may overflow


def _fake(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, w13: Sequence[Tensor], w2: Sequence[Tensor], name: str
) -> Tensor:
    return torch.empty_like(x)


define_op(
    "experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] w13, Tensor[] w2, str name) -> Tensor",
    _run,
    _fake,
    "CompositeExplicitAutograd",
)
