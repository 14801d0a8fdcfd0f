"""Sparse24Config: which checkpoints are ours, and which layers of them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_sparse.errors import OptionError, UnsupportedError
from vllm_sparse.formats import Format, Sparse24Format, claims, detect
from vllm_sparse.formats.bitmask import BitmaskFormat
from vllm_sparse.formats.dense import DenseFormat
from vllm_sparse.formats.mixed import MixedFormat
from vllm_sparse.formats.names import is_ignored
from vllm_sparse.formats.packed import PackedFormat
from vllm_sparse.formats.passthrough import PassThroughFormat
from vllm_sparse.formats.sparse_bitmask import SparseBitmaskFormat
from vllm_sparse.plugin import METHOD
from vllm_sparse.plugin.compat import (
    additional_config,
    enable_dependent_launch,
    fuse_kernels,
    logger,
    pipeline_parallel_size,
    routed_experts_class,
    shares_embeddings,
    warn_if_untested,
)
from vllm_sparse.plugin.options import Options
from vllm_sparse.plugin.report import LoadReport
from vllm_sparse.scheme import Scheme, get_scheme


class Sparse24Config(QuantizationConfig):
    """vLLM's view of a 2:4 checkpoint.

    Attributes:
        format: how the layers that are, or may be, 2:4 are stored.
        stock: vLLM's own config for the others; None if they are not quantized.
        report: what was loaded how.
    """

    def __init__(self, fmt: Format | None = None) -> None:
        super().__init__()
        self.format = fmt or DenseFormat()
        self.stock = stock_config(self.format)
        self.report = LoadReport()
        self._table: torch.nn.Module | None = None  # the embedding in 8 bits, when it has been made

    @cached_property
    def options(self) -> Options:
        """The user's options, read when the first layer is made, since vLLM's config is not known before."""
        options = Options.parse(additional_config())
        if options.scheme is not None and not isinstance(self.format, DenseFormat):
            raise OptionError(
                f"additional-config {METHOD}: scheme {options.scheme!r} applies to dense checkpoints, "
                f"this one is stored as {self.format.name}"
            )
        return options

    @property
    def load_scheme(self) -> Scheme | None:
        """The scheme that 2:4 layers of a dense checkpoint are quantized to while loading, None for their own."""
        return None if self.options.scheme is None else get_scheme(self.options.scheme)

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
            raise UnsupportedError(
                f"--quantization {METHOD}: the checkpoint's quantization_config (quant_method "
                f"{config.get('quant_method')!r}, format {config.get('format')!r}) is none of the 2:4 formats this "
                f"version reads"
            )
        if isinstance(fmt, SparseBitmaskFormat):
            fmt.tensors("the model", 0, 0, torch.bfloat16)  # says how to convert it
        if isinstance(fmt, PassThroughFormat):
            logger.info("sparse24: nothing in this checkpoint is 2:4; vLLM's own methods serve it")
        return cls(fmt)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None, **kwargs: Any
    ) -> str | None:
        """Claim a checkpoint that is 2:4 by its config, unless the user asked for another method. Never raises."""
        if user_quant == METHOD:
            return METHOD
        try:
            ours = user_quant in (None, hf_quant_cfg.get("quant_method")) and claims(hf_quant_cfg)
        except Exception:  # called for every quantized model there is, also for those with odd configs
            return None
        return METHOD if ours else None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules that the checkpoint's config lists, from the checkpoint's names to vLLM's."""
        self.format = renamed_modules(self.format, hf_to_vllm_mapper)
        if self.stock is not None:
            self.stock.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_cache_scale_mapper(self) -> Any:
        """Return vLLM's renaming of tensors, and the names that the checkpoint's format has others for."""
        from vllm.model_executor.models.utils import WeightsMapper

        if pipeline_parallel_size() == 1:  # else another rank may have the embedding
            self._check_table()
        renamed = dict(self.format.renamed)
        if isinstance(self.format, (PackedFormat, MixedFormat)):
            renamed[".weight_shape"] = None  # metadata, see Sparse24LinearMethod
        return WeightsMapper(orig_to_new_suffix=renamed) | QuantizationConfig.get_cache_scale_mapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a linear layer; anything else is left to vLLM."""
        from vllm.model_executor.layers.linear import LinearBase

        from vllm_sparse.plugin.linear import Sparse24DetectedLinearMethod, Sparse24LinearMethod

        if self.stock is not None:
            self.stock.packed_modules_mapping = self.packed_modules_mapping
        module = prefix or type(layer).__name__
        experts = routed_experts_class()
        if experts is not None and isinstance(layer, experts):
            return self._moe_method(layer, module)
        if self._has_sparse_head(layer, module):
            return self._head_method(module)
        if self.format.embeddings and (method := self._table_method(layer, prefix)) is not None:
            return method
        if not isinstance(layer, LinearBase):
            return None if self.stock is None else self.stock.get_quant_method(layer, prefix)
        fmt, _ = self.format, self.options  # wrong options are an error whatever the layers are
        warn_if_untested()
        enable_dependent_launch()
        fuse_kernels()
        found = self._stored_as(module, fmt)
        if found is None:
            self.report.ignored(module)
            return self.stock_method(layer, prefix)
        kind = Sparse24LinearMethod if fmt.promises_sparse else Sparse24DetectedLinearMethod
        return kind(self, module, *found)

    def _has_sparse_head(self, layer: torch.nn.Module, module: str) -> bool:
        """Return whether ``layer`` is a head of its own, which the checkpoint stores 2:4, a row for each token."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        fmt = self.format
        return (
            isinstance(layer, ParallelLMHead)
            and isinstance(fmt, (Sparse24Format, BitmaskFormat))
            and not is_ignored(module, getattr(fmt, "ignore", ()))
            and fmt.scheme_of(module) is not None
            and not shares_embeddings()
        )

    def _head_method(self, module: str) -> Any:
        from vllm_sparse.plugin.head import Sparse24HeadMethod

        scheme = self.format.scheme_of(module)
        assert scheme is not None
        return Sparse24HeadMethod(self, module, module, scheme)

    def _table_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of an embedding in 8 bits or of a head that shares it, None for any other layer."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from vllm_sparse.plugin.embedding import Int8EmbeddingMethod, Int8HeadMethod

        tables = self.format.embeddings
        if isinstance(layer, ParallelLMHead):
            if not shares_embeddings():
                return None
            self._check_table()
            return Int8HeadMethod(prefix, self._table)
        # Some models, Llama's among them, do not tell their embedding's name.
        name = prefix or (tables[0] if len(tables) == 1 else "")
        if not isinstance(layer, VocabParallelEmbedding) or name not in tables:
            return None
        self._table = layer
        return Int8EmbeddingMethod(name)

    def _check_table(self) -> None:
        """Raise UnsupportedError if vLLM has made the model and not asked for the method of its embedding."""
        if self.format.embeddings and self._table is None:
            raise UnsupportedError(
                f"{self.format.embeddings[0]}: stored in int8, but vLLM's model does not let its embeddings be "
                f"quantized; restore them with 'vllm-sparse convert --to dense', or compress with --embeddings dense"
            )

    def stock_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method that vLLM itself has for a linear layer that is not 2:4."""
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        return UnquantizedLinearMethod() if self.stock is None else self.stock.get_quant_method(layer, prefix)

    def stock_moe_method(self, layer: Any, module: str) -> Any:
        """Return the method that vLLM itself has for experts that are not 2:4."""
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

        own = None if self.stock is None else self.stock.get_quant_method(layer, module)
        return UnquantizedFusedMoEMethod(layer.moe_config) if own is None else own

    def _moe_method(self, layer: Any, module: str) -> Any:
        from vllm_sparse.plugin.experts import Sparse24MoEMethod

        _ = self.options
        warn_if_untested()
        parts = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
        found = self._scheme_of_all(
            module, [f"{module}.{expert}.{part}" for expert in range(layer.global_num_experts) for part in parts]
        )
        if found is None:
            self.report.ignored(module)
            return self.stock_moe_method(layer, module)
        return Sparse24MoEMethod(self, layer, module, found)

    def _stored_as(self, module: str, fmt: Format) -> tuple[str, Scheme] | None:
        """Return a checkpoint's name for ``module`` and its scheme, or None if it is stored dense.

        vLLM fuses layers (q, k and v into one) that a checkpoint names one by one; they have to agree.
        """
        if is_ignored(module, getattr(fmt, "ignore", ())):
            return None
        # Asked by the names of its parts: a fused name matches no target that is a part's name or a pattern of it.
        names = fused_names(module, self.packed_modules_mapping)
        scheme = self._scheme_of_all(module, names)
        return None if scheme is None else (names[0], scheme)

    def _scheme_of_all(self, module: str, names: list[str]) -> Scheme | None:
        """Return the scheme that the checkpoint has for all of ``names``, None if they are stored dense."""
        schemes = {name: self.format.scheme_of(name) for name in names}
        if len(set(schemes.values())) > 1:
            kinds: dict[str, str] = {}  # the first name of each kind
            for name, scheme in schemes.items():
                kinds.setdefault(scheme.name if scheme else "dense", name.removeprefix(f"{module.rpartition('.')[0]}."))
            told = ", ".join(f"{name} {kind}" for kind, name in kinds.items())
            raise UnsupportedError(
                f"{module}: vLLM runs its parts as one layer, but the checkpoint stores them differently ({told}); "
                f"compress all of them alike or none"
            )
        return schemes[names[0]]


def fused_names(module: str, packed_modules_mapping: Mapping[str, list[str]]) -> list[str]:
    """Return the names by which a checkpoint calls the parts of ``module``; its own if it is not fused."""
    parent, dot, name = module.rpartition(".")
    return [f"{parent}{dot}{part}" for part in packed_modules_mapping.get(name, [name])]


def stock_config(fmt: Format) -> QuantizationConfig | None:
    """Return vLLM's own config for the layers that ``fmt`` leaves to others, None if those are not quantized."""
    config = fmt.stock_config()
    if config is None:
        return None
    from vllm.model_executor.layers.quantization import get_quantization_config

    return get_quantization_config("compressed-tensors").from_config(deepcopy(config))


def renamed_modules(value: Any, mapper: Any) -> Any:
    """Return a format (or a part of one) in which every tuple of module names went through vLLM's ``mapper``."""
    changes: dict[str, Any] = {}
    for field in fields(value):
        old = getattr(value, field.name)
        if not isinstance(old, tuple):
            continue
        if all(isinstance(entry, str) for entry in old):
            changes[field.name] = tuple(mapper.apply_list(list(old)))
        else:
            changes[field.name] = tuple(renamed_modules(entry, mapper) for entry in old)
    return replace(value, **changes)
