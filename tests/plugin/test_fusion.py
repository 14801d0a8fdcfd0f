"""The compiler pass on graphs as torch's compiler makes them; numbers come from an op written in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor
from torch.nn.functional import silu

from vllm_sparse.kernels.cuda_quantize import quantize
from vllm_sparse.plugin.fusion import FuseSiluQuantize

FUSED, PLAIN = "silu_multiply_fp8_quantize", "fp8_quantize"


class Recorder(FuseSiluQuantize):
    """The pass, and the names of our ops in the graphs that it leaves."""

    def __init__(self) -> None:
        self.ops: list[str] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        super().__call__(graph)
        graph.lint()
        targets = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        self.ops += [t.overloadpacket.__name__ for t in targets if t.namespace == "vllm_sparse"]


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(1, keepdim=True).float() / 448).clamp(min=1 / (448 * 512))
    return (x / scale).to(torch.float8_e4m3fn), scale


@pytest.fixture(autouse=True)
def ops_on_cpu() -> Iterator[None]:
    """Give the two ops, which are CUDA's alone, a meaning on the CPU; the same random numbers in every test."""
    library = torch.library.Library("vllm_sparse", "IMPL")
    library.impl(PLAIN, plain, "CPU")
    library.impl(FUSED, lambda x: plain(silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :]), "CPU")
    torch.manual_seed(0)
    yield
    library._destroy()


def compiled(function: Callable[..., tuple[Tensor, Tensor]], *arguments: Tensor) -> list[str]:
    """Run ``function`` compiled, compare with eager, and return the names of our ops in its graph."""
    torch._dynamo.reset()
    recorder = Recorder()
    with inductor.patch(post_grad_custom_post_pass=recorder, force_disable_caches=True):
        got = torch.compile(function, dynamic=True)(*arguments)
    (codes, scale), (eager, eager_scale) = got, function(*arguments)
    want = eager.float() * eager_scale
    # Codes turn over, each by a sixteenth, where eager rounds once more often; what is wrong is wrong by its size.
    assert float((codes.float() * scale - want).norm()) < 0.1 * float(want.norm())
    return recorder.ops


def gated(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return quantize((silu(x[..., :half]) * x[..., half:]).reshape(-1, half).to(x.dtype).contiguous())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gated_mlp_is_one_op(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 256, dtype=dtype)
    assert compiled(lambda x, w: gated(x @ w), torch.randn(7, 64, dtype=dtype), weight) == [FUSED]


def test_every_layer_of_a_graph() -> None:
    def layers(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = gated(x @ w)
        return gated((codes.to(x.dtype) * scale.to(x.dtype)) @ w)

    x, w = torch.randn(5, 64, dtype=torch.bfloat16), torch.randn(64, 128, dtype=torch.bfloat16)
    assert compiled(layers, x, w) == [FUSED, FUSED]


def test_what_only_looks_like_it_stays() -> None:
    def up_first(x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[-1] // 2
        return quantize(x[:, :half] * silu(x[:, half:]))

    def overlapping(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(silu(x[:, :96]) * x[:, 32:])

    def product_is_needed(x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[-1] // 2
        product = silu(x[:, :half]) * x[:, half:]
        codes, scale = quantize(product)
        return codes.float() + product, scale

    x = torch.randn(6, 128, dtype=torch.bfloat16)
    for function in (up_first, overlapping, product_is_needed):
        assert compiled(function, x) == [PLAIN], function.__name__


def test_another_version_of_the_pass_is_another_cache_entry() -> None:
    assert FuseSiluQuantize().uuid() == FuseSiluQuantize().uuid()
    assert len(FuseSiluQuantize().uuid()) == 64
