"""The seam between weights and kernels: ``prepare`` packs once at load, ``apply`` multiplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_sparse.weight import LinearSpec, Sparse24Weight

# A CUDA kernel with up to this many tokens may start while the one before it ends (programmatic dependent launch). With
# more, its blocks take the multiprocessors from a kernel that still needs them: 9 % of a block's time at 2048 tokens on
# an H200 (docs/decisions/0062).
MOST_OVERLAPPED_TOKENS = 512

_LIBRARY = torch.library.Library("vllm_sparse", "FRAGMENT")


class Kernel(ABC):
    """One kernel family. Stateless: everything it needs at run time is in ``spec`` and the packed tensors.

    Attributes:
        name: the word used in logs, options and benchmarks.
        quantizes_input: True if ``apply`` takes activations as they are and, for schemes that quantize them, does it
            itself; False if such schemes want codes ``[m, k]`` of ``spec.scheme.activation`` and their scales.
    """

    name: ClassVar[str]
    quantizes_input: ClassVar[bool]

    @abstractmethod
    def reason_against(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Return None if this kernel can run ``spec`` on ``device``, otherwise one sentence that says why not."""

    @abstractmethod
    def prepare(self, spec: LinearSpec, weight: Sparse24Weight) -> dict[str, Tensor]:
        """Pack ``weight`` on its own device. Names and shapes depend on ``spec`` alone."""

    @abstractmethod
    def apply(
        self,
        spec: LinearSpec,
        packed: Mapping[str, Tensor],
        x: Tensor,
        x_scale: Tensor | None,
        bias: Tensor | None,
        x_zero: Tensor | None = None,
    ) -> Tensor:
        """Return ``x @ W.T + bias``, ``[m, n]`` of ``spec.dtype``.

        Args:
            x: ``[m, k]``, m >= 0: activations of ``spec.dtype``, or codes (see ``quantizes_input``).
            x_scale: float32 ``[m, 1]``, or ``[1]`` for static activations; None when x is not quantized.
            bias: ``[n]`` of ``spec.dtype`` or None.
            x_zero: int32 zero points of the codes, ``[m, 1]`` or, static, ``[1]``; None when they are symmetric.
        """


def zero_point_tensors(weight: Sparse24Weight) -> dict[str, Tensor]:
    """Return what a kernel that adds up int8 codes needs where activations have a zero point, nothing elsewhere.

    The sum of (x - zero) * W is that of x * W less zero times ``weight_sum`` int32 ``[n]``, each channel's codes added
    up. Static zero points are ``input_zero``.
    """
    if weight.symmetric_input:
        return {}
    sums = {"weight_sum": weight.values.sum(1, dtype=torch.int32)}
    return sums if weight.input_zero is None else sums | {"input_zero": weight.input_zero}


def contiguous_and_aligned(x: Tensor) -> Tensor:
    """Return ``x``, or a copy of it, contiguous at a multiple of 16 bytes, as CUDA kernels load it."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def define_op(signature: str, implementation: Callable[..., Any], fake: Callable[..., Any], device: str) -> None:
    """Register ``torch.ops.vllm_sparse.<name>`` so that torch.compile and CUDA graphs see one opaque call.

    Args:
        signature: a schema such as ``"cpu_linear(Tensor x, int n) -> Tensor"``; nothing in it may be mutated.
        implementation: the function for ``device``.
        fake: the same function on shapes alone.
        device: dispatch key, ``"CPU"``, ``"CUDA"`` or ``"CompositeExplicitAutograd"`` for any.
    """
    name = signature.split("(", 1)[0]
    _LIBRARY.define(signature, tags=(torch.Tag.needs_fixed_stride_order,))
    _LIBRARY.impl(name, implementation, device)
    _LIBRARY._register_fake(name, fake)
