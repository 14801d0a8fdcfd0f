"""The output head of a checkpoint that stores it 2:4 too: its rows are tokens, cut and padded as vLLM's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.plugin.linear import Sparse24LinearMethod


class Sparse24HeadMethod(Sparse24LinearMethod):
    """A ``ParallelLMHead`` that its checkpoint promises to be 2:4, in a format with a row per output feature."""

    def create_weights(self, layer: Any, *sizes: Any, **named: Any) -> None:
        """Register the checkpoint's tensors for this rank's tokens and the padding behind them."""
        super().create_weights(layer, *sizes, **named | {"weight_loader": head_loader(layer)})


def head_loader(layer: Any) -> Callable[[Any, Tensor], None]:
    """Return the loader of ``layer``'s tensors.

    vLLM's own fills the padding with zeros, which are no positions; here it repeats a token, as nothing reads it.
    """
    tokens, shard = layer.org_vocab_size, layer.shard_indices

    def load(param: Any, loaded_weight: Tensor) -> None:
        if getattr(param, "output_dim", None) is None or param.data.shape[0] == 1:
            param.load_replicated(loaded_weight)
            return
        want = [tokens, *param.data.shape[1:]]
        if list(loaded_weight.shape) != want:
            raise FormatError(
                f"{param.label}: expected shape {want} in the checkpoint, got {list(loaded_weight.shape)}"
            )
        if loaded_weight.dtype not in param.accepts:
            raise FormatError(
                f"{param.label}: expected {param.accepts[0]} in the checkpoint, got {loaded_weight.dtype}"
            )
        rows = torch.arange(shard.org_vocab_start_index, shard.org_vocab_end_index)
        own = len(rows)
        param.data[:own].copy_(loaded_weight[rows])
        param.data[own:].copy_(loaded_weight[:1].expand_as(param.data[own:]))
        param.loaded.add("all")

    return load
