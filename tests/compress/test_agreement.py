"""The same numbers as llm-compressor's own solvers on the same inputs; only where it is installed."""

import pytest
import torch

from tests.compress.test_identities import inputs
from vllm_sparse.compress.gptq import gptq
from vllm_sparse.compress.grid import search_grid
from vllm_sparse.compress.hessian import damp, energy
from vllm_sparse.compress.pattern import Pattern
from vllm_sparse.compress.sparsegpt import sparsegpt
from vllm_sparse.scheme import SCHEMES

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")


def layer_of(weight):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


@pytest.mark.parametrize(("pattern", "pruned", "size"), [("2:4", 2, 4), ("1:4", 3, 4), ("4:8", 4, 8), ("0.6", 0, 0)])
def test_sparsegpt(pattern, pruned, size):
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    weight, _, h = inputs(k=256, n=96, tokens=2000, dtype=torch.float32)
    layer = layer_of(weight)
    _, theirs = sparsify_weight(
        layer, {layer: h.clone()}, Pattern.parse(pattern).pruned, pruned, size, 128, 0.01, False
    )
    result = damp(h)
    ours, mask = sparsegpt(weight, result.factor, pattern=Pattern.parse(pattern))
    errors = [float(energy(weight - found, result.h).sum()) for found in (ours, theirs)]
    assert float(((theirs != 0) == mask).double().mean()) > 0.9995
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize(("strategy", "group_size"), [("channel", -1), ("group", 32)])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(strategy, group_size, act_order):
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    weight, _, h = inputs(k=256, n=96, tokens=2000, dtype=torch.float32)
    grid = search_grid(weight, SCHEMES["w4a16"], group_size)
    arguments = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy=strategy, actorder="weight" if act_order else None,
        group_size=None if group_size == -1 else group_size,
    )  # fmt: skip
    scales = grid.scales[None]
    zeros = torch.zeros_like(scales)
    theirs = quantize_weight(weight[None].clone(), h[None].clone(), scales, zeros, None, arguments)[0][0]
    result = damp(h)
    ours = gptq(weight, result.h, grid, torch.ones_like(weight, dtype=torch.bool), act_order)
    errors = [float(energy(weight - found, result.h).sum()) for found in (ours, theirs)]
    assert float(torch.isclose(ours, theirs, rtol=1e-3, atol=1e-5).double().mean()) > 0.99
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
