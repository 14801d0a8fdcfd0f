"""Run a kernel on activations as they are: whoever has a weight and a kernel, a layer or an expert, calls this."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vllm_sparse.kernels.base import Kernel
from vllm_sparse.kernels.reference import quantize_asymmetric
from vllm_sparse.plugin.compat import Quantizer
from vllm_sparse.weight import LinearSpec


def run_kernel(
    kernel: Kernel,
    spec: LinearSpec,
    packed: Mapping[str, Tensor],
    x: Tensor,
    bias: Tensor | None,
    quantize: Quantizer | None,
) -> Tensor:
    """Return ``x @ W.T + bias`` for ``x`` ``[m, k]`` of ``spec.dtype``, quantized first if the kernel wants codes.

    Args:
        quantize: makes symmetric codes, None for a scheme that leaves activations as they are.
    """
    if quantize is None or kernel.quantizes_input:
        return kernel.apply(spec, packed, x, None, bias)
    if spec.symmetric_input:
        return kernel.apply(spec, packed, *quantize(x, packed.get("input_scale")), bias)
    # vLLM has no op for it that its compiler knows; it makes one kernel of these lines.
    codes, scale, zero = quantize_asymmetric(x, packed.get("input_scale"), packed.get("input_zero"))
    return kernel.apply(spec, packed, codes, scale, bias, zero)
