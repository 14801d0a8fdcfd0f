"""Residual sum and norm on the GPU against the same arithmetic in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_sparse.kernels import cuda_norm, cuda_quantize
from vllm_sparse.kernels.cuda_norm import add_rms_norm, add_rms_norm_quantize

EPSILON = 1e-5


def test_shapes_are_known_without_running_it() -> None:
    x, weight = torch.empty(3, 128, device="meta", dtype=torch.bfloat16), torch.empty(128, device="meta").bfloat16()
    normed, total = add_rms_norm(x, x, weight, EPSILON)
    assert (normed.shape, normed.dtype) == (total.shape, total.dtype) == ((3, 128), torch.bfloat16)
    codes, scale, total = add_rms_norm_quantize(x, x, weight, EPSILON)
    assert (codes.shape, codes.dtype) == ((3, 128), torch.float8_e4m3fn)
    assert (scale.shape, scale.dtype, total.dtype) == ((3, 1), torch.float32, torch.bfloat16)


@pytest.mark.skipif(cuda_norm._cuda is None, reason="the extension module vllm_sparse._cuda is not built")
@pytest.mark.parametrize("k", [0, 12, 131080])
def test_rows_that_it_cannot_do_are_named_before_a_gpu_is_asked_for(k: int) -> None:
    with pytest.raises(RuntimeError, match=r"^add_norm: k must be a multiple of 8 up to 131072$"):
        cuda_norm._cuda.add_norm(0, 0, 0, 0, 0, 0, 0, False, EPSILON, 1, k, 0, False, 0)


def expected(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's native implementation, with the mean in float64."""
    total = x.float() + residual.float()
    mean = total.double().pow(2).mean(-1, keepdim=True)
    return (total * (mean + EPSILON).rsqrt().float()).to(x.dtype) * weight, total.to(x.dtype)


def rows(m: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(m + k)
    x, residual = (torch.randn(m, k, device="cuda", generator=generator).mul(s).to(dtype) for s in (1, 4))
    weight = (torch.rand(k, device="cuda", generator=generator) + 0.5).to(dtype)
    x[:, k // 2] *= 50
    x[0] = residual[0] = 0
    return x, residual, weight


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_norm.available(), reason="needs a GPU of compute capability 9.0 and vllm_sparse._cuda")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("k", [8, 4088, 4096, 4104, 8192, 14336, 131072])
    @pytest.mark.parametrize("m", [1, 2, 64, 65, 300])
    def test_torchs_values(self, m: int, k: int, dtype: torch.dtype) -> None:
        given = rows(m, k, dtype)
        normed, total = add_rms_norm(*given, EPSILON)
        want, sum_of_both = expected(*given)
        assert torch.equal(total, sum_of_both)
        # The mean's last bit turns the rounding of few values over, each by one unit in the last place.
        torch.testing.assert_close(normed, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert float((normed != want).float().mean()) < 0.01

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("k", [8, 4096, 5120, 8192, 18432])
    @pytest.mark.parametrize("m", [1, 7, 64, 65, 300])
    def test_codes_are_those_of_two_ops(self, m: int, k: int, dtype: torch.dtype) -> None:
        given = rows(m, k, dtype)
        codes, scale, total = add_rms_norm_quantize(*given, EPSILON)
        normed, sum_of_both = add_rms_norm(*given, EPSILON)
        want, want_scale = cuda_quantize.quantize(normed)
        assert torch.equal(total, sum_of_both) and torch.equal(scale, want_scale)
        assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))

    def test_rows_with_a_stride_and_no_rows(self) -> None:
        x, residual, weight = rows(9, 512, torch.bfloat16)
        got = add_rms_norm(x[:, 8:264], residual[:, 8:264], weight[4:260], EPSILON)
        want = add_rms_norm(*(part.clone() for part in (x[:, 8:264], residual[:, 8:264], weight[4:260])), EPSILON)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert add_rms_norm(x[:0], residual[:0], weight, EPSILON)[0].shape == (0, 512)
        assert add_rms_norm_quantize(x[:0], residual[:0], weight, EPSILON)[0].shape == (0, 512)

    def test_repeats_and_graphs_are_bitwise_equal(self) -> None:
        for m, k in ((1, 4096), (3, 14336), (80, 8192)):
            given = rows(m, k, torch.bfloat16)
            first = add_rms_norm_quantize(*given, EPSILON)
            for _ in range(20):
                again = add_rms_norm_quantize(*given, EPSILON)
                assert all(torch.equal(a.float(), b.float()) for a, b in zip(first, again, strict=True))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = add_rms_norm_quantize(*given, EPSILON)
            graph.replay()
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(first, captured, strict=True))

    def test_a_chain_of_dependent_launches_waits_for_its_input(self) -> None:
        x, residual, weight = rows(16, 4096, torch.bfloat16)
        apart, together = (x, residual), (x, residual)
        for _ in range(20):
            apart = add_rms_norm(*apart, weight, EPSILON)
            torch.cuda.synchronize()
        for _ in range(20):
            together = add_rms_norm(*together, weight, EPSILON)
        assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))

    def test_op_is_sound(self) -> None:
        given = rows(4, 256, torch.bfloat16)
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        for op in (torch.ops.vllm_sparse.add_rms_norm, torch.ops.vllm_sparse.add_rms_norm_fp8_quantize):
            torch.library.opcheck(op.default, (*given, EPSILON), test_utils=checks)
