"""The plugin's options, given to vLLM as ``--additional-config '{"sparse24": {...}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm_sparse.errors import OptionError
from vllm_sparse.kernels import KERNELS
from vllm_sparse.kernels.cpu import CpuW4A8Kernel
from vllm_sparse.plugin import METHOD
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import LinearSpec


@dataclass(frozen=True)
class Options:
    """What the user may ask of the plugin.

    Attributes:
        strict: a layer of a dense checkpoint that is not 2:4 is an error instead of being served dense.
        scheme: quantize the 2:4 layers of a dense checkpoint to this scheme while loading.
        kernel: use this kernel alone.
        cpu_activations: "int8" lets w4a16 layers on the CPU take int8 activations: faster from two tokens on, less
            exact.
    """

    strict: bool = False
    scheme: str | None = None
    kernel: str | None = None
    cpu_activations: str | None = None

    def kernel_for(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Return the name of the one kernel to consider for a layer, None for the best of all."""
        if self.kernel is None and self.cpu_activations and spec.scheme.name == "w4a16" and device.type == "cpu":
            return CpuW4A8Kernel.name
        return self.kernel

    @classmethod
    def parse(cls, additional_config: Mapping[str, Any]) -> Options:
        """Read ``additional_config["sparse24"]``; raise OptionError on anything that is not an option."""
        given = additional_config.get(METHOD, {})
        if not isinstance(given, Mapping):
            raise OptionError(f"additional-config {METHOD}: expected an object, got {given!r}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise OptionError(
                f"additional-config {METHOD}: unknown option {unknown[0]!r}, expected one of {', '.join(known)}"
            )
        options = cls(**given)
        if not isinstance(options.strict, bool):
            raise OptionError(f"additional-config {METHOD}: strict must be true or false, got {options.strict!r}")
        if options.scheme is not None:
            get_scheme(options.scheme)
        if options.kernel is not None and options.kernel not in [kernel.name for kernel in KERNELS]:
            kernels = ", ".join(kernel.name for kernel in KERNELS)
            raise OptionError(
                f"additional-config {METHOD}: unknown kernel {options.kernel!r}, expected one of {kernels}"
            )
        if options.cpu_activations not in (None, "int8"):
            raise OptionError(
                f"additional-config {METHOD}: cpu_activations must be 'int8', got {options.cpu_activations!r}"
            )
        return options
