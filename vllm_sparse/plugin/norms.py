"""Residual sums and norms before our ops, in a graph of torch's compiler."""

from __future__ import annotations

import torch
from torch import fx

from vllm_sparse.kernels import cuda_norm
from vllm_sparse.plugin.compat import compilers_add_norm

_ours = torch.ops.vllm_sparse


def replace_norms(graph: fx.Graph) -> None:
    """Put our op in place of vLLM's for a residual sum and its norm, where one of our ops reads what is normalized.

    The compiler's kernel lets the linear layer behind it start only when it ends itself; with ours the layer's weight
    is on the way from the beginning (docs/decisions/0058). A quantization to e4m3 behind it becomes a part of it.
    """
    vllms = compilers_add_norm()
    if vllms is None or not cuda_norm.available():
        return
    for node in list(graph.find_nodes(op="call_function", target=vllms)):
        if _fits(node) and (readers := _readers(node)):
            _replace(node, readers)


def _fits(node: fx.Node) -> bool:
    """Return whether our op takes the arguments ``(x, residual, weight, epsilon[, variance size])``."""
    x, residual, weight, _, *variance_size = node.args
    if any(size is not None for size in variance_size) or not isinstance(weight, fx.Node):
        return False
    values = [argument.meta["val"] for argument in (x, residual, weight)]  # type: ignore[union-attr]
    k = values[0].shape[-1]
    return (
        values[0].dim() == 2
        and values[0].dtype in (torch.bfloat16, torch.float16)
        and all(value.dtype == values[0].dtype for value in values)
        and isinstance(k, int)
        and k % 8 == 0
        and k <= cuda_norm.MOST_COLUMNS
    )


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return what reads the first output of ``node``, or nothing if no op of ours does."""
    found = [reader for user in node.users if user.args[1] == 0 for reader in user.users]
    ours = [reader for reader in found if getattr(reader.target, "namespace", None) == "vllm_sparse"]
    return found if ours else []


def _replace(node: fx.Node, readers: list[fx.Node]) -> None:
    """Make ``node`` our op: its results (normed, sum) stay at their places, or become codes, scales and sum."""
    node.args = node.args[:4]
    if len(readers) > 1 or readers[0].target is not _ours.fp8_quantize.default:
        node.target = _ours.add_rms_norm.default
        return
    (quantize,) = readers
    (normed,) = quantize.all_input_nodes
    node.target = _ours.add_rms_norm_fp8_quantize.default
    node.meta["val"] = (*quantize.meta["val"], node.meta["val"][1])
    for user in list(node.users):
        if user is not normed:
            user.update_arg(1, 2)
    quantize.replace_all_uses_with(node)
    node.graph.erase_node(quantize)
    node.graph.erase_node(normed)
