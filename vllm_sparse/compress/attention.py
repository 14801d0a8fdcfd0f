"""Causal attention of calibration passes on a CPU: 16-bit products of large blocks instead of torch's small ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_ROWS = 64  # queries at once; the keys after them are never multiplied


class FastAttention(TorchFunctionMode):
    """Inside, causal bf16 attention without a mask of its own is ``causal_attention``; everything else is torch's."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention and _takes(*args, **kwargs):
            named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
            return causal_attention(named["query"], named["key"], named["value"], named.get("scale"))
        return function(*args, **kwargs)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Return what ``scaled_dot_product_attention`` does with ``is_causal`` and, for fewer key heads, ``enable_gqa``.

    Args:
        query: ``[batch, heads, length, d]``; key and value: ``[batch, key heads, length, d]``.
        scale: None: 1 / sqrt(d).
    """
    batch, heads, length, d = query.shape
    shared = key.shape[1]
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    query = query * (d**-0.5 if scale is None else scale)
    future = torch.full((_ROWS, _ROWS), -torch.inf, dtype=query.dtype).triu(1)
    output = query.new_empty(batch, length, heads, d).transpose(1, 2)  # the order in which callers want it
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        rows = stop - start
        queries = query[:, :, start:stop].reshape(batch * shared, -1, d)
        scores = torch.bmm(queries, keys[:, :stop].transpose(1, 2))
        scores.unflatten(1, (-1, rows))[..., start:] += future[:rows, :rows]
        part = torch.bmm(scores.softmax(-1), values[:, :stop])  # torch sums a softmax in float32
        output[:, :, start:stop] = part.view(batch, heads, rows, d)
    return output


def _takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    return (
        not torch.is_grad_enabled()
        and query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and is_causal
        and attn_mask is None
        and dropout_p == 0
        and query.dim() == 4
        and query.shape[2] == key.shape[2]
        and (enable_gqa or query.shape[1] == key.shape[1])
    )
