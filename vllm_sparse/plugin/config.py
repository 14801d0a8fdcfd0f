"""Sparse24Config: which checkpoints are ours, and which layers of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_sparse.errors import OptionError, UnsupportedError
from vllm_sparse.formats import FORMATS, Format, detect
from vllm_sparse.plugin import METHOD
from vllm_sparse.plugin.compat import additional_config, warn_if_untested
from vllm_sparse.plugin.options import Options
from vllm_sparse.plugin.report import LoadReport
from vllm_sparse.scheme import Scheme


class Sparse24Config(QuantizationConfig):
    """vLLM's view of a 2:4 checkpoint.

    Attributes:
        format: how the 2:4 layers are stored; None for a dense checkpoint, whose 2:4 layers are found while loading.
        report: what was loaded how.
    """

    def __init__(self, fmt: Format | None = None) -> None:
        super().__init__()
        self.format = fmt
        self.report = LoadReport()

    @cached_property
    def options(self) -> Options:
        """The user's options, read when the first layer is made, since vLLM's config is not known before."""
        options = Options.parse(additional_config())
        if options.scheme is not None and self.format is not None:
            raise OptionError(
                f"additional-config {METHOD}: scheme {options.scheme!r} applies to dense checkpoints, "
                f"this one is stored as {self.format.name}"
            )
        return options

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # each kernel says itself what it needs, and the reference kernel needs nothing

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Sparse24Config:
        """Read a checkpoint's ``quantization_config``.

        Raises:
            FormatError: it is one of ours and wrong.
            UnsupportedError: it is none of the formats we read.
        """
        fmt = detect(config)
        if fmt is None:
            method = config.get("quant_method")
            raise UnsupportedError(
                f"--quantization {METHOD}: the checkpoint's quantization_config (quant_method {method!r}, format "
                f"{config.get('format')!r}) is none of the 2:4 formats this version reads"
            )
        return cls(fmt)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None, **kwargs: Any
    ) -> str | None:
        """Claim a checkpoint that is 2:4 by its config, unless the user asked for another method. Never raises."""
        if user_quant == METHOD:
            return METHOD
        try:
            own_method = hf_quant_cfg.get("quant_method")
            if user_quant not in (None, own_method) or detect_kind(hf_quant_cfg) is None:
                return None
        except Exception:  # called for every quantized model there is, also for those with odd configs
            return None
        return METHOD

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules that the format's config lists, from the checkpoint's names to vLLM's."""
        fmt = self.format
        if is_dataclass(fmt) and any(field.name == "ignore" for field in fields(fmt)):
            names = hf_to_vllm_mapper.apply_list(list(fmt.ignore))  # type: ignore[attr-defined]
            self.format = replace(fmt, ignore=tuple(names))  # type: ignore[type-var, call-arg, assignment]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a linear layer; None for anything else, which vLLM then serves as it always does."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from vllm_sparse.plugin.linear import Sparse24LinearMethod, Sparse24OnlineLinearMethod

        if not isinstance(layer, LinearBase):
            return None
        module = prefix or type(layer).__name__
        _ = self.options  # wrong options are an error whatever the layers are
        warn_if_untested()
        if self.format is None:
            return Sparse24OnlineLinearMethod(self, module)
        found = self._stored_as(module, self.format)
        if found is None:
            self.report.ignored(module)
            return UnquantizedLinearMethod()
        return Sparse24LinearMethod(self, module, self.format, *found)

    def _stored_as(self, module: str, fmt: Format) -> tuple[str, Scheme] | None:
        """Return a checkpoint's name for ``module`` and its scheme, or None if it is stored dense.

        vLLM fuses layers (q, k and v into one) that a checkpoint names one by one; they have to agree.
        """
        if fmt.scheme_of(module) is None:
            return None
        names = fused_names(module, self.packed_modules_mapping)
        schemes = {name: fmt.scheme_of(name) for name in names}
        if len(set(schemes.values())) > 1:
            told = ", ".join(f"{name.rpartition('.')[2]} {s.name if s else 'dense'}" for name, s in schemes.items())
            raise UnsupportedError(
                f"{module}: vLLM runs its parts as one layer, but the checkpoint stores them differently ({told}); "
                f"compress all of them alike or none"
            )
        scheme = schemes[names[0]]
        return None if scheme is None else (names[0], scheme)


def fused_names(module: str, packed_modules_mapping: Mapping[str, list[str]]) -> list[str]:
    """Return the names by which a checkpoint calls the parts of ``module``; its own if it is not fused."""
    parent, dot, name = module.rpartition(".")
    return [f"{parent}{dot}{part}" for part in packed_modules_mapping.get(name, [name])]


def detect_kind(config: Mapping[str, Any]) -> type[Format] | None:
    """Return the kind of format ``config`` says it is, without reading the rest of it."""
    return next((kind for kind in FORMATS if kind.matches(config)), None)
