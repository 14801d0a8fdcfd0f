"""The experts op on a GPU, with the kernels that would be chosen there, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.plugin.layers import random_hub
from vllm_sparse.kernels import choose_kernel
from vllm_sparse.kernels.reference import quantize_activations
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight

pytest.importorskip("vllm")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
COUNT, HIDDEN, SIZE = 5, 256, 128


def rounded(x: Tensor, scheme: str) -> Tensor:
    """Return ``x`` in float64 as the scheme's activations hold it."""
    dtype = SCHEMES[scheme].activation
    if dtype is None:
        return x.double()
    codes, scale = quantize_activations(x, dtype, None)
    return codes.double() * scale.double()


def weighted_sum(x: Tensor, share: Tensor, ids: Tensor, weights: list[list[Sparse24Weight]]) -> Tensor:
    """Return the op's result in float64; what leaves a kernel is rounded to the dtype of ``x``."""
    scheme, out = weights[0][0].scheme.name, torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert, (up, down) in enumerate(zip(*weights, strict=True)):
        token, place = (ids == expert).nonzero(as_tuple=True)
        gate, up_out = up.matmul(rounded(x[token], scheme)).to(x.dtype).chunk(2, -1)
        made = down.matmul(rounded(silu(gate) * up_out, scheme)).to(x.dtype)
        out.index_add_(0, token, made.double() * share[token, place].double().unsqueeze(1))
    return out


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int8", "w4a16"])
def test_weighted_sum(scheme: str, dtype: torch.dtype, tokens: int, graph: bool) -> None:
    from vllm_sparse.plugin.expert_op import Experts, Projection, register

    device, projections, stacked, weights = torch.device("cuda"), [], [], []
    for shape in ((2 * SIZE, HIDDEN), (HIDDEN, SIZE)):
        made = [random_hub(*shape, scheme, seed).to(device) for seed in range(COUNT)]
        spec = made[0].spec(dtype)
        kernel = choose_kernel(spec, device)
        assert kernel.name != "reference"
        packed = [kernel.prepare(spec, weight) for weight in made]
        projections.append(Projection(spec, kernel.name, tuple(packed[0])))
        stacked.append([torch.stack([one[name] for one in packed]) for name in packed[0]])
        weights.append(made)
    torch.manual_seed(0)
    x = torch.randn(tokens, HIDDEN, dtype=dtype, device=device)
    x[tokens // 2 :: 3] = 0  # the scale of such a token must not be zero
    share = torch.rand(tokens, 2, device=device)
    ids = torch.rand(tokens, COUNT - 1, device=device).topk(2).indices.int()  # the last expert has no tokens
    ids[-1, 0] = -1  # another rank's
    arguments = (x, share, ids, *stacked, register(Experts(*projections, "silu", False)))
    got = torch.ops.vllm_sparse.experts(*arguments)
    if graph:
        captured = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            got = torch.ops.vllm_sparse.experts(*arguments)
        captured.replay()
    want = weighted_sum(x, share, ids, weights)
    # Sums in another order turn a bit of what is rounded to 16, and with that a few codes, over.
    allowed = {"fp8": 2e-2, "int8": 1e-2}.get(scheme, 0.0) + torch.finfo(dtype).eps
    error = float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
    assert error <= allowed, f"off by {error:.2e} of the result, allowed {allowed:.2e}"
