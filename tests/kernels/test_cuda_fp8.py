"""The FP8 kernel against float64; packing against the layout's own words, which needs no GPU."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_sparse.kernels import cuda_fp8
from vllm_sparse.kernels.cuda_fp8 import BRICK_BYTES, CudaFp8Kernel, pack_bricks
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import Sparse24Weight

KERNEL = CudaFp8Kernel()
FP8 = torch.float8_e4m3fn
PAIRS = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
# Rounding to bf16 (2^-9 at most, 2^-10 or so on average) dominates; the tensor cores' own rounding of sums adds less.
TOLERANCE = 3e-3
EDGES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256, 257, 300, 511, 512, 1025)


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and cuda_fp8._cuda is not None


gpu = pytest.mark.skipif(not hopper(), reason="needs a GPU of compute capability 9.0 and vllm_sparse._cuda")


def random_weight(n: int, k: int, seed: int = 0, integers: bool = False, static: bool = False) -> Sparse24Weight:
    generator = torch.Generator().manual_seed(seed)
    if integers:
        values = torch.randint(-2, 3, (n, k // 2), generator=generator).float()
    else:
        values = torch.randn(n, k // 2, generator=generator)
    pairs = PAIRS[torch.randint(0, 6, (n, k // 4), generator=generator)]
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=4)
    scales = torch.ones(n, 1) if integers else torch.rand(n, 1, generator=generator) * 0.02 + 0.01
    input_scale = torch.tensor([0.03]) if static else None
    positions = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return Sparse24Weight(get_scheme("fp8"), values.to(FP8), positions, scales, -1, input_scale)


def codes(m: int, k: int, seed: int = 1, integers: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-2, 3, (m, k), generator=generator).float().to(FP8), torch.ones(m, 1)
    x = torch.randn(m, k, generator=generator).to(FP8)
    return x, torch.rand(m, 1, generator=generator) * 0.1 + 0.01


def exact(weight: Sparse24Weight, x: Tensor, x_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x.double() @ weight.to_dense(torch.float64).T * x_scale.double()
    return out if bias is None else out + bias.double()


class Layer:
    """A packed weight on the GPU."""

    def __init__(self, weight: Sparse24Weight, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> None:
        self.weight = weight.to(device)
        self.spec = self.weight.spec(dtype)
        self.packed = KERNEL.prepare(self.spec, self.weight)

    def __call__(self, x: Tensor, x_scale: Tensor, bias: Tensor | None = None) -> Tensor:
        device = self.weight.device
        bias = None if bias is None else bias.to(device)
        return KERNEL.apply(self.spec, self.packed, x.to(device), x_scale.to(device), bias)

    def error(self, x: Tensor, x_scale: Tensor, bias: Tensor | None = None) -> float:
        device = self.weight.device
        want = exact(self.weight, x.to(device), x_scale.to(device), None if bias is None else bias.to(device))
        got = self(x, x_scale, bias)
        assert got.shape == want.shape
        return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(("n", "k"), [(64, 256), (80, 96), (128, 1056), (16, 32)])
def test_bricks_hold_every_value_and_position_where_the_kernel_looks(n: int, k: int) -> None:
    weight = random_weight(n, k)
    bricks = pack_bricks(weight.values, weight.positions)
    assert list(bricks.shape) == [-(-n // 64), -(-k // 256) * 2, BRICK_BYTES]
    values, nibbles = weight.values.view(torch.uint8), weight.nibbles()
    generator = torch.Generator().manual_seed(2)
    for _ in range(300):
        row, column = (int(torch.randint(0, limit, (), generator=generator)) for limit in (n, k))
        step, rest = column // 64, column % 64
        brick = bricks[row // 64, column // 128]
        r, kept = row % 64, rest // 2  # of the step's 32 kept values
        place = step % 2 * 2048 + r // 8 * 256 + kept // 16 * 128 + r % 8 * 16 + kept % 16
        assert brick[place] == values[row, column // 2]
        thread = r // 16 * 32 + r % 8 * 4 + rest // 32 * 2 + r % 16 // 8
        byte = brick[4096 + thread * 8 + step % 2 * 4 + rest % 32 // 8]
        assert (byte >> (column // 4 % 2 * 4)) & 15 == nibbles[row, column // 4]


def test_padding_multiplies_by_zero_with_valid_positions() -> None:
    weight = random_weight(16, 32)
    bricks = pack_bricks(weight.values, weight.positions)
    assert int((bricks[..., :4096] != 0).sum()) == int((weight.values.view(torch.uint8) != 0).sum())
    assert int((bricks[..., 4096:] != 0x44).sum()) == int((weight.positions != 0x44).sum())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n": 24}, "needs n a multiple of 16 and k of 32, not n=24 and k=256"),
        ({"k": 48}, "needs n a multiple of 16 and k of 32, not n=64 and k=48"),
        ({"dtype": torch.float32}, "writes bfloat16 or float16, not torch.float32"),
        ({"scheme": get_scheme("int8")}, "runs scheme fp8, not int8"),
    ],
)
def test_says_what_it_cannot_run(change: dict[str, object], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_fp8, "_cuda", object())
    spec = dataclasses.replace(random_weight(64, 256).spec(torch.bfloat16), **change)
    assert KERNEL.reason_against(spec, torch.device("cuda")) == sentence


def test_says_that_it_needs_a_cuda_device_and_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = random_weight(64, 256).spec(torch.bfloat16)
    assert KERNEL.reason_against(spec, torch.device("cpu")) == "runs on CUDA devices, not on cpu"
    monkeypatch.setattr(cuda_fp8, "_cuda", None)
    monkeypatch.setattr(cuda_fp8, "_IMPORT_ERROR", "no such file", raising=False)
    reason = KERNEL.reason_against(spec, torch.device("cuda"))
    assert reason == "the extension module vllm_sparse._cuda is not built (no such file)"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_compiler_neither_spills_nor_serializes(tmp_path: Path) -> None:
    """Registers in local memory, or multiplications that wait for each other, would pass every other test."""
    source = Path(__file__).parents[2] / "csrc" / "cuda" / "fp8_linear.cu"
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-O3", "-DNDEBUG", "-std=c++17", "-Xptxas=-v", "-cubin"]
    command = ["nvcc", *flags, "-o", str(tmp_path / "fp8.cubin"), str(source)]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "serialized" not in log
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= 10
    assert set(spills) == {("0", "0")}


@pytest.mark.skipif(cuda_fp8._cuda is None, reason="vllm_sparse._cuda is not built")
class TestChoice:
    """Configurations are data: they can be read where there is no GPU."""

    @staticmethod
    def tokens(m: int, n: int, k: int, multiprocessors: int = 132) -> int:
        module = cuda_fp8._cuda
        return module.fp8_configuration_tokens(module.fp8_choose_configuration(m, n, k, multiprocessors))

    @pytest.mark.parametrize("m", EDGES)
    def test_up_to_192_tokens_are_one_tile_with_the_fewest_tokens_that_hold_them(self, m: int) -> None:
        tokens = self.tokens(m, 4096, 4096)
        assert tokens >= min(m, 128)
        assert m > 192 or tokens == min(t for t in (8, 16, 32, 64, 96, 128, 192) if t >= m)

    def test_many_tokens_take_the_largest_tile(self) -> None:
        assert self.tokens(4096, 28672, 4096) == 256

    @pytest.mark.parametrize("multiprocessors", [1, 78, 132, 148])
    def test_any_size_and_any_device_has_a_configuration(self, multiprocessors: int) -> None:
        for m in (1, 100, 193, 100_000):
            for n, k in ((16, 32), (4096, 14336), (152_064, 8192)):
                assert self.tokens(m, n, k, multiprocessors) >= 8


@gpu
@pytest.mark.gpu
class TestOnGpu:
    def test_every_m(self) -> None:
        layer = Layer(random_weight(208, 608))
        for m in range(1, 301):
            assert layer.error(*codes(m, 608, seed=m)) < TOLERANCE, m

    @pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 96), (800, 160), (1040, 896), (4096, 4096), (3584, 18944)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_shapes_with_bias(self, n: int, k: int, dtype: torch.dtype) -> None:
        layer = Layer(random_weight(n, k, seed=n + k), dtype)
        bias = torch.randn(n).to(dtype)
        for m in EDGES if n < 2000 else EDGES[::4]:
            assert layer.error(*codes(m, k, seed=m), bias) < TOLERANCE, m

    def test_every_configuration_is_exact_on_integers(self) -> None:
        weight = random_weight(336, 1184, integers=True)
        layer = Layer(weight)
        module = cuda_fp8._cuda
        for index in range(module.fp8_configurations()):
            tokens = module.fp8_configuration_tokens(index)
            for m in sorted({1, tokens - 1, tokens, tokens + 1, 3 * tokens + 5}):
                x, x_scale = codes(m, 1184, integers=True)
                x, x_scale = x.cuda(), x_scale.cuda()
                out = torch.full((m, 336), float("nan"), dtype=torch.bfloat16, device="cuda")
                module.fp8_linear(
                    x.data_ptr(), 1184, x_scale.data_ptr(), m > 1, layer.packed["weight_packed"].data_ptr(),
                    layer.packed["weight_scale"].data_ptr(), 0, out.data_ptr(), False, m, 336, 1184, 0, index, True,
                    torch.cuda.current_stream().cuda_stream,
                )  # fmt: skip
                assert torch.equal(out, exact(layer.weight, x, x_scale).bfloat16()), (index, m)

    def test_static_scale_and_rows_with_a_stride(self) -> None:
        layer = Layer(random_weight(256, 512, static=True))
        x, _ = codes(33, 1024)
        assert layer.error(x.cuda()[:, :512], torch.tensor([0.03])) < TOLERANCE
        assert layer.error(x.cuda()[:, 8:520], torch.tensor([0.03])) < TOLERANCE  # not aligned: copied

    def test_zero_tokens(self) -> None:
        assert Layer(random_weight(64, 256))(*codes(0, 256)).shape == (0, 64)

    def test_zero_patterns_and_negative_zeros(self) -> None:
        patterns = [mask for mask in range(16) if mask.bit_count() <= 2]  # the 11 patterns of a 2:4 group
        groups = torch.tensor([[mask >> i & 1 for i in range(4)] for mask in patterns], dtype=torch.float32)
        picks = torch.randint(0, len(patterns), (64, 64), generator=torch.Generator().manual_seed(3))
        kept = groups[picks].flatten(1)
        dense = (kept * torch.randn(64, 256) + (1 - kept) * -0.0).to(FP8)
        assert (dense.view(torch.uint8) == 0x80).any()
        weight = Sparse24Weight.from_dense(dense, get_scheme("fp8"), torch.ones(64, 1))
        assert Layer(weight).error(*codes(5, 256)) < TOLERANCE

    def test_largest_values_and_nan(self) -> None:
        weight = random_weight(64, 256)
        values = weight.values.view(torch.uint8).clone()
        values[0], values[1, 0] = 0x7E, 0x7F
        layer = Layer(dataclasses.replace(weight, values=values.view(FP8)))
        x = torch.full((3, 256), 448.0).to(FP8)
        out = layer(x, torch.ones(3, 1))
        assert torch.allclose(
            out[:, 0].float(), torch.tensor(448.0 * 448 * 128 * float(weight.scales[0]), device="cuda"), rtol=1e-2
        )
        assert bool(out[:, 1].isnan().all()) and not bool(out[:, 2:].isnan().any())

    @pytest.mark.parametrize("m", [1, 16, 64, 100, 256, 700])
    def test_repeats_are_bitwise_equal(self, m: int) -> None:
        layer = Layer(random_weight(1024, 2048))
        x, x_scale = (t.cuda() for t in codes(m, 2048))
        want = layer(x, x_scale)
        assert all(torch.equal(layer(x, x_scale), want) for _ in range(100))

    def test_dependent_launches_in_a_graph_and_on_a_side_stream(self) -> None:
        """Each layer reads what the one before wrote, so a launch that starts too early shows."""
        layer = Layer(random_weight(512, 512))
        x, x_scale = (t.cuda() for t in codes(24, 512))

        def chain(x: Tensor) -> Tensor:
            for _ in range(20):
                x = (layer(x, x_scale).float() * 4).clamp(-448, 448).to(FP8)
            return x.view(torch.uint8)

        want = chain(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert torch.equal(chain(x), want)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chain(x)
        for _ in range(10):
            got.zero_()
            graph.replay()
            assert torch.equal(got, want)

    def test_second_device(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        assert Layer(random_weight(320, 512), device="cuda:1").error(*codes(40, 512)) < TOLERANCE
        assert torch.cuda.current_device() == 0

    def test_op_is_sound(self) -> None:
        layer = Layer(random_weight(64, 256))
        x, x_scale = (t.cuda() for t in codes(4, 256))
        arguments = (x, x_scale, layer.packed["weight_packed"], layer.packed["weight_scale"], None, 64, torch.bfloat16)
        # test_schema compares inputs by arithmetic that torch does not have for fp8.
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.vllm_sparse.fp8_linear.default, arguments, test_utils=checks)
