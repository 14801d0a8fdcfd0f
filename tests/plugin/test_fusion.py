"""The compiler pass on graphs as torch's compiler makes them; numbers come from an op written in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor
from torch.nn.functional import silu

from vllm_sparse.kernels import cuda_norm
from vllm_sparse.kernels.cuda_quantize import quantize
from vllm_sparse.plugin.fusion import FusionPass

FUSED, PLAIN = "silu_multiply_fp8_quantize", "fp8_quantize"
LINEAR, GATED_LINEAR = "w4a16_linear", "w4a16_linear_silu_multiply"
NORM, NORM_QUANTIZE = "add_rms_norm", "add_rms_norm_fp8_quantize"


class Recorder(FusionPass):
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


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    total = x.float() + residual.float()
    normed = total * torch.rsqrt(total.pow(2).mean(1, keepdim=True) + epsilon)
    return normed.to(x.dtype) * weight, total.to(x.dtype)


def add_rms_norm_quantize(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    normed, total = add_rms_norm(*arguments)
    return (*plain(normed), total)


@pytest.fixture(autouse=True)
def ops_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the ops, which are CUDA's alone, a meaning on the CPU; the same random numbers in every test.

    The "packed" weight of the linear ones is a dense ``[n, k]``.
    """
    library = torch.library.Library("vllm_sparse", "IMPL")
    library.impl(PLAIN, plain, "CPU")
    library.impl(FUSED, lambda x: plain(silu_multiply(x)), "CPU")
    library.impl(NORM, add_rms_norm, "CPU")
    library.impl(NORM_QUANTIZE, add_rms_norm_quantize, "CPU")
    library.impl(LINEAR, lambda x, weight, *_: x @ weight.T, "CPU")
    library.impl(GATED_LINEAR, lambda x, weight, *_: silu_multiply(x @ weight.T), "CPU")
    monkeypatch.setattr(cuda_norm, "available", lambda: True)
    torch.manual_seed(0)
    yield
    library._destroy()


def compiled(
    function: Callable[..., Tensor | tuple[Tensor, Tensor]], *arguments: Tensor, dynamic: bool = True
) -> list[str]:
    """Run ``function`` compiled, compare with eager, and return the names of our ops in its graph."""
    torch._dynamo.reset()
    recorder = Recorder()
    with inductor.patch(post_grad_custom_post_pass=recorder, force_disable_caches=True):
        got = value(torch.compile(function, dynamic=dynamic or None)(*arguments))
    want = value(function(*arguments))
    # Codes turn over, each by a sixteenth, where eager rounds once more often; what is wrong is wrong by its size.
    assert float((got - want).norm()) < 0.1 * float(want.norm())
    return recorder.ops


def value(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return what a function made, codes times scales if it is both."""
    return result.float() if isinstance(result, Tensor) else result[0].float() * result[1]


def silu_multiply(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return silu(x[..., :half]) * x[..., half:]


def gated(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize(silu_multiply(x).reshape(-1, x.shape[-1] // 2).to(x.dtype).contiguous())


def linear(x: Tensor, weight: Tensor, halves: bool = True) -> Tensor:
    """Return what ``Sparse24LinearMethod.apply`` does of the w4a16 kernel."""
    tokens = x.reshape(-1, x.shape[-1]).to(weight.dtype).contiguous()
    n = weight.shape[0]
    return torch.ops.vllm_sparse.w4a16_linear(tokens, weight, None, None, n, 128, halves).reshape(*x.shape[:-1], n)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_w4a16_layer_stores_the_product(dtype: torch.dtype) -> None:
    x, up, down = (torch.randn(*size, dtype=dtype) * size[1] ** -0.5 for size in ((7, 64), (256, 64), (64, 128)))

    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return linear(silu_multiply(linear(x, up)), down, halves=False)

    assert compiled(mlp, x, up, down) == [GATED_LINEAR, LINEAR]
    assert compiled(lambda *a: mlp(mlp(*a), *a[1:]), x, up, down) == [GATED_LINEAR, LINEAR] * 2


def test_a_w4a16_layer_whose_output_is_not_only_gated_stays() -> None:
    x, weight = torch.randn(7, 64, dtype=torch.bfloat16), torch.randn(256, 64, dtype=torch.bfloat16)

    def packed_in_order(x: Tensor, weight: Tensor) -> Tensor:
        return silu_multiply(linear(x, weight, halves=False))

    def needed_elsewhere(x: Tensor, weight: Tensor) -> Tensor:
        made = linear(x, weight)
        return silu_multiply(made) + made.sum(1, keepdim=True)

    def with_an_adapter(x: Tensor, weight: Tensor) -> Tensor:
        return silu_multiply(linear(x, weight) + x.repeat(1, 4))

    for function in (packed_in_order, needed_elsewhere, with_an_adapter):
        assert compiled(function, x, weight) == [LINEAR], function.__name__


def norm(x: Tensor, residual: Tensor, weight: Tensor, *size: int) -> tuple[Tensor, Tensor]:
    normed, total = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, 1e-5, *size)
    return normed, total


def compiled_with_known_rows(function: Callable[..., Tensor], x: Tensor, *arguments: Tensor) -> list[str]:
    """Let the number of tokens alone be unknown to the compiler, as vLLM does."""
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(arguments[0], 0)
    return compiled(function, x, *arguments, dynamic=False)


def rows(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*sizes, dtype=dtype) * sizes[-1] ** -0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_before_a_linear_layer_is_our_op(dtype: torch.dtype) -> None:
    def block(x: Tensor, residual: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        normed, residual = norm(linear(x, weight), residual, scale)
        normed, residual = norm(linear(normed, weight), residual, scale)
        return linear(normed, weight) + residual

    given = rows(7, 64, dtype=dtype), rows(7, 64, dtype=dtype), rows(64, dtype=dtype), rows(64, 64, dtype=dtype)
    assert compiled_with_known_rows(block, *given) == [LINEAR, NORM, LINEAR, NORM, LINEAR]


def test_a_norm_before_a_quantization_takes_it_in() -> None:
    def block(x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
        normed, residual = norm(x, residual, scale)
        codes, scales = quantize(normed)
        return codes.float() * scales + residual

    def normed_is_needed(x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
        normed, residual = norm(x, residual, scale)
        codes, scales = quantize(normed)
        return codes.float() * scales + residual + normed

    given = rows(7, 64), rows(7, 64), torch.ones(64, dtype=torch.bfloat16)
    assert compiled_with_known_rows(block, *given) == [NORM_QUANTIZE]
    assert compiled_with_known_rows(normed_is_needed, *given) == [NORM, PLAIN]


def test_a_norm_that_our_op_does_not_do_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(x: Tensor, residual: Tensor, scale: Tensor, weight: Tensor, *size: int) -> Tensor:
        normed, residual = norm(x, residual, scale, *size)
        return linear(normed, weight) + residual

    def nothing_of_ours(x: Tensor, residual: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        normed, residual = norm(x, residual, scale)
        return normed @ weight.T + residual

    given = rows(7, 64), rows(7, 64), rows(64), rows(64, 64)
    assert compiled_with_known_rows(nothing_of_ours, *given) == []
    assert compiled_with_known_rows(lambda *a: block(*a, 32), *given) == [LINEAR]  # of a part of the row
    assert compiled_with_known_rows(lambda x, r, s, w: block(x, r, s.float(), w), *given) == [LINEAR]  # as Gemma's
    odd = rows(7, 36), rows(7, 36), rows(36), rows(36, 36)
    assert compiled_with_known_rows(block, *odd) == [LINEAR]
    monkeypatch.setattr(cuda_norm, "available", lambda: False)
    assert compiled_with_known_rows(block, *given) == [LINEAR]


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
    assert FusionPass().uuid() == FusionPass().uuid()
    assert len(FusionPass().uuid()) == 64
