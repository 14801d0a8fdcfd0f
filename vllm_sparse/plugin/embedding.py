"""Embedding tables in 8 bits: a look-up dequantizes the rows it takes, a head that shares it multiplies codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.embedding import check_scales, dequantize_rows, table_tensors
from vllm_sparse.plugin.compat import is_dummy_load, logger, model_name
from vllm_sparse.plugin.head import head_loader
from vllm_sparse.plugin.origin import Origin
from vllm_sparse.plugin.parameters import make_parameter, take_complete

_DUMMY_SCALE = 1e-5  # 127 codes of it are as large as vLLM's own dummy weights
_INT8_TOKENS = 8  # up to here torch's product of bf16 and int8 is the faster one on a CPU with AVX-512
_INT8_FEATURES = 32  # it takes so many at a time and reads beyond the end of what is left
_ROWS = 8192  # of a head that are dequantized at a time


class Int8EmbeddingMethod(QuantizeMethodBase):
    """A ``VocabParallelEmbedding`` of int8 codes ``weight`` [tokens, k] and bf16 scales ``weight_scale`` [tokens, 1].

    Its tensors are used as they are loaded, so that the head's may be the very same and a reload keeps all in place.

    Args:
        module: the table's name in vLLM.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self.origin = Origin(model_name(), (module,))
        self.dummy = is_dummy_load()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register codes and scales of this rank's tokens and the padding behind them."""
        self.dtype = params_dtype
        loader = self.origin.naming(head_loader(layer))
        self._specs = table_tensors(sum(output_partition_sizes), input_size_per_partition)
        for spec in self._specs:
            layer.register_parameter(spec.name, make_parameter(spec, self.module, output_partition_sizes, loader))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded; make up a table for a dummy load."""
        if self.dummy:
            layer.weight.data.random_(-127, 128, generator=torch.Generator(layer.weight.device).manual_seed(0))
            layer.weight_scale.data.fill_(_DUMMY_SCALE)
            return
        with self.origin.named():
            for spec in self._specs:
                if not take_complete(getattr(layer, spec.name)):
                    raise FormatError(f"{self.module}: tensor {spec.name} is not in the checkpoint")
            check_scales(self.module, layer.weight_scale[: layer.shard_indices.num_org_elements])
        logger.info("sparse24: %s in int8, %.2f MB", self.module, layer.weight.nbytes / 1e6)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Return the rows ``[..., k]`` of token ids ``input_`` ``[...]`` in the model's dtype."""
        codes = functional.embedding(input_, layer.weight)
        return dequantize_rows(codes, functional.embedding(input_, layer.weight_scale), self.dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the logits ``[..., tokens]`` of hidden states ``x`` ``[..., k]``, in the dtype of ``x``."""
        logits = product(x.reshape(-1, x.shape[-1]), layer.weight, layer.weight_scale)
        logits = logits if bias is None else logits + bias
        return logits.reshape(*x.shape[:-1], logits.shape[-1])


class Int8HeadMethod(Int8EmbeddingMethod):
    """A ``ParallelLMHead`` that shares the tensors of ``table``, the embedding's layer."""

    def __init__(self, module: str, table: Any) -> None:
        super().__init__(module)
        self._table = table

    def create_weights(self, layer: Any, *sizes: Any, **named: Any) -> None:
        """Register the table's own tensors."""
        layer.register_parameter("weight", self._table.weight)
        layer.register_parameter("weight_scale", self._table.weight_scale)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leave it to the embedding."""


def product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return ``x`` ``[m, k]`` times the table's transpose, ``[m, n]`` in the dtype of ``x``.

    Args:
        codes, scales: int8 ``[n, k]`` and bfloat16 ``[n, 1]``.
    """
    few_on_cpu = x.device.type == "cpu" and len(x) <= _INT8_TOKENS
    if few_on_cpu and x.dtype == torch.bfloat16 and x.shape[1] % _INT8_FEATURES == 0:
        return torch._weight_int8pack_mm(x.contiguous(), codes, scales.flatten())
    parts = zip(codes.split(_ROWS), scales.split(_ROWS), strict=True)
    return torch.cat([functional.linear(x, dequantize_rows(*part, x.dtype)) for part in parts], dim=-1)
