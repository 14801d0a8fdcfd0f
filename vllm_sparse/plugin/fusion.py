"""A pass for torch's compiler: what stands between two linear layers becomes a part of fewer kernels, of our own."""

from __future__ import annotations

import hashlib
import inspect
import sys
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import (
    CallFunction,
    Ignored,
    KeywordArg,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)

from vllm_sparse.plugin import norms

_aten, _ours = torch.ops.aten, torch.ops.vllm_sparse
_convert = torch.ops.prims.convert_element_type.default


def _products() -> list[CallFunction]:
    """Return ``silu(x[:, :d]) * x[:, d:]`` in the forms that the compiler's decompositions give SiLU."""

    def product(silu: CallFunction) -> CallFunction:
        up = CallFunction(_aten.slice.Tensor, KeywordArg("x"), Ignored(), KeywordArg("up_begin"), Ignored())
        return CallFunction(_aten.mul.Tensor, CallFunction(_convert, silu, Ignored()), up)

    sliced = CallFunction(_aten.slice.Tensor, KeywordArg("x"), Ignored(), KeywordArg("gate_begin"), Ignored())
    gate = CallFunction(_convert, sliced, torch.float32, _users=2)
    divisor = CallFunction(_aten.add.Tensor, CallFunction(_aten.exp.default, CallFunction(_aten.neg.default, gate)), 1)
    sigmoid = CallFunction(_aten.sigmoid.default, gate)
    return [product(CallFunction(_aten.div.Tensor, gate, divisor)),
            product(CallFunction(_aten.mul.Tensor, gate, sigmoid))]  # fmt: skip


def _are_halves(match: Match, product: fx.Node) -> bool:
    """Return whether the two slices are the halves of a matrix's rows, the gate first."""
    x = match.kwargs["x"]
    shape, part = x.meta["val"].shape, product.meta["val"].shape
    two_rows = len(shape) == 2 and shape[1] == 2 * part[1]
    begin = match.kwargs["up_begin"]
    half = begin.meta["val"] if isinstance(begin, fx.Node) else begin
    return bool(two_rows and match.kwargs["gate_begin"] == 0 and half == part[1])


def _is_quantized(match: Match) -> bool:
    return _are_halves(match, match.output_node().args[0])  # type: ignore[arg-type]


def _is_a_layers(match: Match) -> bool:
    """Return whether the product is all that is made of what a linear layer with interleaved halves returns."""
    linear = match.kwargs["x"]
    if linear.target is not _ours.w4a16_linear.default or len(linear.users) != 2:
        return False
    return bool(linear.args[-1]) and _are_halves(match, match.output_node())


def _put_in_place(match: Match, op: Any, arguments: tuple[Any, ...]) -> None:
    output = match.output_node()
    with output.graph.inserting_before(output):
        fused = output.graph.call_function(op, arguments)
    fused.meta.update(output.meta)
    output.replace_all_uses_with(fused)
    match.erase_nodes()


def _join_quantization(match: Match, **found: Any) -> None:
    _put_in_place(match, _ours.silu_multiply_fp8_quantize.default, (found["x"],))


def _join_linear(match: Match, **found: Any) -> None:
    linear = found["x"]
    _put_in_place(match, _ours.w4a16_linear_silu_multiply.default, linear.args[:-1])
    linear.graph.erase_node(linear)


@cache
def _matcher() -> PatternMatcherPass:
    passes = PatternMatcherPass(pass_name="vllm_sparse_fuse_silu")
    for product in _products():
        register_graph_pattern(product, extra_check=_is_a_layers, pass_dict=passes)(_join_linear)  # type: ignore[arg-type]
        quantized = CallFunction(_ours.fp8_quantize.default, product, _users=2)
        register_graph_pattern(quantized, extra_check=_is_quantized, pass_dict=passes)(_join_quantization)  # type: ignore[arg-type]
    return passes


class FusionPass(CustomGraphPass):
    """Put one op in place of several kernels, wherever a graph has them; another form of graph stays as it is.

    - ``silu(gate) * up`` behind a w4a16 linear layer: the layer's kernel stores the product alone; before a
      quantization to e4m3: that makes the product itself. The compiler's own kernel would read and write 16 bits in
      between (docs/decisions/0066 and 0058).
    - A residual sum and its norm before one of our ops: see ``plugin/norms.py``.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place."""
        _matcher().apply(graph)
        norms.replace_norms(graph)

    def uuid(self) -> str:
        """Return what compiled graphs are cached by: another version of these files is another pass."""
        sources = (inspect.getsource(module) for module in (sys.modules[__name__], norms))
        return hashlib.sha256("".join(sources).encode()).hexdigest()
