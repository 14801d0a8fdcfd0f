"""Dynamic e4m3 quantization on the GPU against the same arithmetic in torch, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from vllm_sparse.kernels import cuda_quantize
from vllm_sparse.kernels.cuda_quantize import quantize, silu_multiply_quantize

FP8 = torch.float8_e4m3fn
LEAST_SCALE = 1 / (448 * 512)


def test_not_available_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_quantize, "_cuda", None)
    assert not cuda_quantize.available()


def test_shapes_are_known_without_running_it() -> None:
    x = torch.empty(3, 128, device="meta", dtype=torch.bfloat16)
    for (codes, scale), k in ((quantize(x), 128), (silu_multiply_quantize(x), 64)):
        assert (codes.shape, codes.dtype) == ((3, k), FP8)
        assert (scale.shape, scale.dtype) == ((3, 1), torch.float32)


def expected(x: Tensor) -> tuple[Tensor, Tensor]:
    # A tensor of the same device: torch multiplies by the reciprocal of a number, which rounds differently.
    largest = torch.tensor(448.0, device=x.device).expand(len(x), 1)
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / largest).clamp(min=LEAST_SCALE)
    return (x.float() * scale.reciprocal()).clamp(-448, 448).to(FP8), scale


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(got[1], want[1])


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_quantize.available(), reason="needs a GPU of compute capability 9.0 and vllm_sparse._cuda")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("k", [8, 32, 4088, 4096, 4104, 14336, 29568, 131072])
    @pytest.mark.parametrize("m", [1, 2, 64, 65, 300])
    def test_same_bits_as_torch(self, m: int, k: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(m + k)
        x = (torch.randn(m, k, device="cuda", generator=generator) * 5).to(dtype)
        x[:, k // 2] *= 20
        x[0] = 0
        assert same(quantize(x), expected(x))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("k", [8, 4088, 4104, 14336, 29568])
    @pytest.mark.parametrize("m", [1, 64, 65, 300])
    def test_silu_and_product_are_torchs(self, m: int, k: int, dtype: torch.dtype) -> None:
        """Exponentials differ in their last bits, which a rounding to 16 bits shows once in a thousand values."""
        generator = torch.Generator("cuda").manual_seed(m + k)
        x = (torch.randn(m, 2 * k, device="cuda", generator=generator) * 5).to(dtype)
        x[0] = 0
        codes, scale = silu_multiply_quantize(x)
        want, want_scale = expected(silu(x[:, :k]) * x[:, k:])
        torch.testing.assert_close(scale, want_scale, rtol=2**-7, atol=0)
        different = codes.view(torch.uint8) != want.view(torch.uint8)
        assert float(different.float().mean()) < 0.01
        torch.testing.assert_close(codes.float() * scale, want.float() * want_scale, rtol=0.14, atol=1e-3)

    def test_infinite_gates(self) -> None:
        x = torch.tensor([[float("-inf"), -200.0, 200.0, 0.0] * 2 + [1.0] * 8], device="cuda", dtype=torch.bfloat16)
        codes, scale = silu_multiply_quantize(x)
        assert bool(codes[0, 0].float().isnan())  # -inf / (1 + inf), as in torch
        codes, scale = silu_multiply_quantize(x.clamp(min=-1e4))
        torch.testing.assert_close((codes.float() * scale)[0, :4], torch.tensor([0.0, 0.0, 200.0, 0.0], device="cuda"))

    def test_rows_with_a_stride_and_no_rows(self) -> None:
        x = torch.randn(9, 512, device="cuda", dtype=torch.bfloat16)
        assert same(quantize(x[:, 8:264]), expected(x[:, 8:264].contiguous()))
        assert quantize(x[:0])[0].shape == (0, 512)
        assert silu_multiply_quantize(x[:0])[0].shape == (0, 256)
        assert same(silu_multiply_quantize(x[:, 8:264]), silu_multiply_quantize(x[:, 8:264].contiguous()))

    def test_nan_stays_nan(self) -> None:
        x = torch.ones(1, 64, device="cuda", dtype=torch.bfloat16)
        x[0, 5] = float("nan")
        assert bool(quantize(x)[0][0, 5].float().isnan())

    def test_op_is_sound(self) -> None:
        x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        for op in (torch.ops.vllm_sparse.fp8_quantize, torch.ops.vllm_sparse.silu_multiply_fp8_quantize):
            torch.library.opcheck(op.default, (x,), test_utils=checks)

    def test_second_device(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        x = torch.randn(9, 512, device="cuda:1", dtype=torch.bfloat16)
        assert same(quantize(x), expected(x))
        assert torch.cuda.current_device() == 0
