"""Dynamic e4m3 quantization on the GPU against the same arithmetic in torch, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_sparse.kernels import cuda_quantize
from vllm_sparse.kernels.cuda_quantize import quantize

FP8 = torch.float8_e4m3fn
LEAST_SCALE = 1 / (448 * 512)


def test_not_available_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_quantize, "_cuda", None)
    assert not cuda_quantize.available()


def test_shapes_are_known_without_running_it() -> None:
    codes, scale = quantize(torch.empty(3, 64, device="meta", dtype=torch.bfloat16))
    assert (codes.shape, codes.dtype) == ((3, 64), FP8)
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

    def test_rows_with_a_stride_and_no_rows(self) -> None:
        x = torch.randn(9, 512, device="cuda", dtype=torch.bfloat16)
        assert same(quantize(x[:, 8:264]), expected(x[:, 8:264].contiguous()))
        assert quantize(x[:0])[0].shape == (0, 512)

    def test_nan_stays_nan(self) -> None:
        x = torch.ones(1, 64, device="cuda", dtype=torch.bfloat16)
        x[0, 5] = float("nan")
        assert bool(quantize(x)[0][0, 5].float().isnan())

    def test_op_is_sound(self) -> None:
        x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.vllm_sparse.fp8_quantize.default, (x,), test_utils=checks)

    def test_second_device(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        x = torch.randn(9, 512, device="cuda:1", dtype=torch.bfloat16)
        assert same(quantize(x), expected(x))
        assert torch.cuda.current_device() == 0
