"""The one table of kernels, fastest first, and the choice from it."""

from __future__ import annotations

import torch

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import Kernel
from vllm_sparse.kernels.cpu import CpuKernel, CpuW4A8Kernel
from vllm_sparse.kernels.cuda_hopper import CudaBf16Kernel, CudaFp8Kernel, CudaInt8Kernel
from vllm_sparse.kernels.cuda_mma import CudaMmaFp8A16Kernel, CudaMmaKernel
from vllm_sparse.kernels.cuda_w4a16 import CudaW4A16Kernel
from vllm_sparse.kernels.reference import ReferenceKernel
from vllm_sparse.weight import LinearSpec

# Behind the reference kernel, which runs everything, stand those that run only when asked for by name.
KERNELS: tuple[Kernel, ...] = (
    CudaFp8Kernel(),
    CudaInt8Kernel(),
    CudaBf16Kernel(),
    CudaW4A16Kernel(),
    CudaMmaKernel(),
    CudaMmaFp8A16Kernel(),
    CpuKernel(),
    ReferenceKernel(),
    CpuW4A8Kernel(),
)


def reasons_against(spec: LinearSpec, device: torch.device) -> dict[str, str | None]:
    """Return for every kernel, in preference order, why it cannot run ``spec`` on ``device`` (None: it can)."""
    return {kernel.name: kernel.reason_against(spec, device) for kernel in KERNELS}


def choose_kernel(spec: LinearSpec, device: torch.device, only: str | None = None) -> Kernel:
    """Return the first kernel that can run ``spec`` on ``device``.

    Args:
        only: name of the one kernel to consider (tests and benchmarks).

    Raises:
        UnsupportedError: no kernel can; the message holds every kernel's sentence.
    """
    candidates = [kernel for kernel in KERNELS if only in (None, kernel.name)]
    if not candidates:
        known = ", ".join(kernel.name for kernel in KERNELS)
        raise UnsupportedError(f"unknown kernel {only!r}: expected one of {known}")
    reasons = []
    for kernel in candidates:
        reason = kernel.reason_against(spec, device)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise UnsupportedError(
        f"no kernel runs scheme {spec.scheme.name} with n={spec.n}, k={spec.k} on {device}: {'; '.join(reasons)}"
    )
