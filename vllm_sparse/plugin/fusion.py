"""A pass for torch's compiler: SiLU, product and quantization of a gated MLP become one kernel."""

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

_aten, _convert = torch.ops.aten, torch.ops.prims.convert_element_type.default


def _patterns() -> list[CallFunction]:
    """Return ``quantize(silu(x[:, :d]) * x[:, d:])`` in the forms that the compiler's decompositions give SiLU."""

    def quantized(silu: CallFunction) -> CallFunction:
        up = CallFunction(_aten.slice.Tensor, KeywordArg("x"), Ignored(), KeywordArg("up_begin"), Ignored())
        product = CallFunction(_aten.mul.Tensor, CallFunction(_convert, silu, Ignored()), up)
        return CallFunction(torch.ops.vllm_sparse.fp8_quantize.default, product, _users=2)

    sliced = CallFunction(_aten.slice.Tensor, KeywordArg("x"), Ignored(), KeywordArg("gate_begin"), Ignored())
    gate = CallFunction(_convert, sliced, torch.float32, _users=2)
    divisor = CallFunction(_aten.add.Tensor, CallFunction(_aten.exp.default, CallFunction(_aten.neg.default, gate)), 1)
    sigmoid = CallFunction(_aten.sigmoid.default, gate)
    return [quantized(CallFunction(_aten.div.Tensor, gate, divisor)),
            quantized(CallFunction(_aten.mul.Tensor, gate, sigmoid))]  # fmt: skip


def _are_halves(match: Match) -> bool:
    """Return whether the two slices are the halves of a matrix's rows, the gate first."""
    x, product = match.kwargs["x"], match.output_node().args[0]
    shape, part = x.meta["val"].shape, product.meta["val"].shape  # type: ignore[union-attr]
    two_rows = len(shape) == 2 and shape[1] == 2 * part[1]
    begin = match.kwargs["up_begin"]
    half = begin.meta["val"] if isinstance(begin, fx.Node) else begin
    return bool(two_rows and match.kwargs["gate_begin"] == 0 and half == part[1])


def _replace(match: Match, **found: Any) -> None:
    quantize = match.output_node()
    graph = quantize.graph
    with graph.inserting_before(quantize):
        fused = graph.call_function(torch.ops.vllm_sparse.silu_multiply_fp8_quantize.default, (found["x"],))
    fused.meta.update(quantize.meta)
    quantize.replace_all_uses_with(fused)
    match.erase_nodes()


@cache
def _matcher() -> PatternMatcherPass:
    passes = PatternMatcherPass(pass_name="vllm_sparse_fuse_silu_quantize")
    for pattern in _patterns():
        register_graph_pattern(pattern, extra_check=_are_halves, pass_dict=passes)(_replace)  # type: ignore[arg-type]
    return passes


class FuseSiluQuantize(CustomGraphPass):
    """Replace ``quantize(silu(gate) * up)`` of ``kernels.cuda_quantize`` by its one op, wherever a graph has it.

    The compiler's own kernel would write the product in 16 bits for the quantization to read again
    (docs/decisions/0066). A graph in another form stays as it is.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place."""
        _matcher().apply(graph)

    def uuid(self) -> str:
        """Return what compiled graphs are cached by: another version of this file is another pass."""
        return hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()
