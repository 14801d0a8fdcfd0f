"""The mma.sp kernels for every NVIDIA GPU since Ampere: their packing anywhere, their numbers on a GPU."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_sparse.kernels import cuda_mma
from vllm_sparse.kernels.cuda_mma import CudaMmaFp8A16Kernel, CudaMmaKernel, pack_tiles, step_columns
from vllm_sparse.kernels.reference import quantize_activations, quantize_asymmetric
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import LinearSpec, Sparse24Weight

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
KERNEL, FP8_A16 = CudaMmaKernel(), CudaMmaFp8A16Kernel()
PAIRS = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
# Weights enter exactly and sums are float32, so what remains is the rounding of the result, 2^-9 (bf16) or 2^-12 (fp16)
# at most, half of it in the mean square.
TOLERANCE = {BF16: 3e-3, FP16: 4e-4}
EDGES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 191, 255, 256, 257, 300, 511, 513, 1025)
# (scheme, group size, dtype): all that a GPU can run, but for FP8 weights with 16-bit activations.
CASES = [
    ("bf16", -1, BF16),
    ("bf16", -1, FP16),
    ("int8", -1, BF16),
    ("int8", -1, FP16),
    ("fp8", -1, BF16),
    ("w8a16", -1, BF16),
    ("w8a16", 32, FP16),
    ("w8a16", 64, BF16),
    ("w8a16", 128, FP16),
]


def usable() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) and cuda_mma._cuda is not None


gpu = pytest.mark.skipif(not usable(), reason="needs a GPU of compute capability 8.0 and vllm_sparse._cuda")


def random_values(scheme: str, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if scheme in ("int8", "w8a16"):
        return torch.randint(-128, 128, (n, k // 2), generator=generator).to(torch.int8)
    values = torch.randn(n, k // 2, generator=generator)
    return values.to(FP8) if scheme == "fp8" else values.to(dtype)


def random_weight(
    scheme: str, n: int, k: int, group_size: int = -1, dtype: torch.dtype = BF16, seed: int = 0
) -> Sparse24Weight:
    generator = torch.Generator().manual_seed(seed)
    values = random_values(scheme, n, k, dtype, generator)
    pairs = PAIRS[torch.randint(0, 6, (n, k // 4), generator=generator)]
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).to(torch.uint8)
    groups = 1 if group_size == -1 else k // group_size
    scales = (torch.rand(n, groups, generator=generator) * 0.02 + 0.005).to(dtype)
    positions = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return Sparse24Weight(get_scheme(scheme), values, positions, scales if scheme != "bf16" else None, group_size)


def lanes() -> Iterator[tuple[int, int, int]]:
    for lane in range(32):
        yield lane, lane // 4, lane % 4


def kept_bytes(block: Tensor, widen: bool, units: int) -> Tensor:
    """Return ``[16, kept bytes]`` of a row block as the lanes' registers hold them, in the PTX manual's fragments."""
    kept = torch.zeros(16, 16 * units if widen else 32 * units, dtype=torch.uint8)
    for lane, g, t in lanes():
        for unit in range(units):
            for register in range(4):
                row, upper = g + 8 * (register % 2), register // 2
                if widen:
                    word = 512 * (unit // 2) + 16 * lane + 8 * (unit % 2) + 4 * upper
                    for column in range(2):
                        kept[row, 16 * unit + 8 * upper + 2 * t + column] = block[word + 2 * column + register % 2]
                else:
                    word = 512 * unit + 16 * lane + 4 * register
                    at = 32 * unit + 16 * upper + 4 * t
                    kept[row, at : at + 4] = block[word : word + 4]
    return kept


def nibbles_of(block: Tensor, eight_bit: bool, units: int) -> Tensor:
    """Return ``[16, groups]`` of a row block, from the words that the instructions select."""
    words = block[1024 : 1024 + (64 if not eight_bit else 128) * units].view(torch.int32).view(32, -1).tolist()
    nibbles = torch.zeros(16, units * (16 if eight_bit else 8), dtype=torch.uint8)
    for lane, g, t in lanes():
        for unit in range(units):
            for i in range(8):
                if eight_bit:  # lanes t and t + 2: columns 0 ... 31 and 32 ... 63 of row g (t even) or g + 8 (odd)
                    row, group = g + 8 * (t % 2), 16 * unit + 8 * (t // 2) + i
                    nibbles[row, group] = words[lane][unit] >> 4 * i & 15
                elif t // 2 == unit % 2:  # the selector: lanes 0, 1 for even units
                    row, group = g + 8 * (i // 4), 8 * unit + 4 * (t % 2) + i % 4
                    nibbles[row, group] = words[lane][unit // 2] >> 4 * i & 15
    return nibbles


@pytest.mark.parametrize(
    ("scheme", "activation", "n", "k", "group_size"),
    [
        ("bf16", BF16, 16, 32, -1),
        ("bf16", FP16, 144, 160, -1),
        ("int8", torch.int8, 48, 96, -1),
        ("fp8", FP8, 128, 256, -1),
        ("fp8", FP16, 32, 160, -1),
        ("w8a16", BF16, 32, 288, -1),
        ("w8a16", BF16, 144, 160, 32),
        ("w8a16", FP16, 16, 192, 64),
        ("w8a16", FP16, 272, 256, 128),
    ],
)
def test_packing_follows_the_fragments(scheme: str, activation: torch.dtype, n: int, k: int, group_size: int) -> None:
    dtype = activation if activation.itemsize == 2 else BF16
    weight = random_weight(scheme, n, k, group_size, dtype)
    scales = weight.scales if group_size != -1 else None
    packed = pack_tiles(weight.values, weight.positions, scales, group_size, activation)
    widen, columns = weight.values.dtype != activation, step_columns(weight.values.dtype, activation)
    tiles, units, multiple = -(-n // 128), 4 if widen else 2, 1 if widen else 2
    steps = -(-k // (multiple * columns)) * multiple
    size = 1024 + (64 if activation.itemsize == 2 else 128) * units
    groups = 0 if scales is None else columns // group_size
    assert packed.shape == (tiles, steps, 8, size + 32 * groups)
    stored = weight.values.contiguous().view(torch.uint8)
    row_blocks = packed.view(-1, packed.shape[-1])

    def rows(blocks: list[Tensor]) -> Tensor:
        return torch.stack(blocks).view(tiles, steps, 128, -1).transpose(1, 2).reshape(tiles * 128, -1)

    values = rows([kept_bytes(block, widen, units) for block in row_blocks])
    assert torch.equal(values[:n, : stored.shape[1]], stored)
    assert not values[n:].any() and not values[:, stored.shape[1] :].any()
    nibbles = rows([nibbles_of(block, activation.itemsize == 1, units) for block in row_blocks])
    assert torch.equal(nibbles[:n, : k // 4], weight.nibbles())
    assert (nibbles[n:] == 4).all() and (nibbles[:, k // 4 :] == 4).all()
    if scales is not None:
        found = packed[..., size:].contiguous().view(scales.dtype).view(tiles, steps, 8, 8, groups, 2)
        found = found.permute(0, 2, 5, 3, 1, 4).reshape(tiles * 128, steps * groups)
        assert torch.equal(found[:n, : scales.shape[1]], scales)


def spec(scheme: str, **changes: object) -> LinearSpec:
    scale_dtype = None if scheme == "bf16" else BF16
    return dataclasses.replace(LinearSpec(get_scheme(scheme), 64, 128, -1, BF16, scale_dtype), **changes)  # type: ignore[arg-type]


def test_reasons_against(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(cuda_mma, "_cuda", object())

    def reason(
        scheme: str, capability: tuple[int, int], kernel: CudaMmaKernel = KERNEL, **changes: object
    ) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return kernel.reason_against(spec(scheme, **changes), device)

    assert KERNEL.reason_against(spec("bf16"), torch.device("cpu")) == "runs on CUDA devices, not on cpu"
    assert reason("w4a16", (8, 0)) == "runs scheme bf16 or fp8 or int8 or w8a16, not w4a16"
    assert reason("bf16", (9, 0), dtype=torch.float32) == "writes bfloat16 or float16, not torch.float32"
    assert reason("int8", (9, 0), n=72) == "needs n a multiple of 16 and k of 32, not n=72 and k=128"
    assert reason("int8", (7, 5)) == "needs compute capability 8.0 for scheme int8, this device has 7.5"
    assert reason("fp8", (8, 6)) == "needs compute capability 8.9 for scheme fp8, this device has 8.6"
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        assert all(reason(scheme, capability) is None for scheme in ("bf16", "int8", "w8a16"))
    assert all(reason("fp8", capability) is None for capability in ((8, 9), (9, 0), (10, 0), (12, 0)))
    assert reason("fp8", (8, 6), FP8_A16) is None
    assert reason("fp8", (8, 9), FP8_A16) == "is for GPUs without FP8 tensor cores, this device has them"
    assert reason("fp8", (7, 5), FP8_A16) == "needs compute capability 8.0, this device has 7.5"
    assert reason("int8", (8, 6), FP8_A16) == "runs scheme fp8, not int8"


def test_prepare_keeps_channel_scales_apart_and_rounds_to_the_activations() -> None:
    weight = random_weight("int8", 32, 128)
    weight = dataclasses.replace(weight, input_scale=torch.ones(1), layer="static")
    packed = KERNEL.prepare(weight.spec(FP16), weight)
    assert packed["weight_scale"].dtype == torch.float32 and packed["weight_scale"].shape == (32,)
    assert packed["weight_packed"].shape == (1, 2, 8, 1280) and packed["input_scale"].shape == (1,)
    weight = dataclasses.replace(weight, symmetric_input=False, input_zero=torch.zeros(1, dtype=torch.int32))
    packed = KERNEL.prepare(weight.spec(FP16), weight)
    assert torch.equal(packed["weight_sum"], weight.values.int().sum(1).int()) and packed["input_zero"].shape == (1,)
    weight = random_weight("w8a16", 32, 128, 32, torch.float32)
    assert set(KERNEL.prepare(weight.spec(BF16), weight)) == {"weight_packed"}
    weight = random_weight("bf16", 16, 64, dtype=BF16)
    in_fp16 = KERNEL.prepare(weight.spec(FP16), weight)["weight_packed"]
    assert torch.equal(in_fp16, pack_tiles(weight.values.half(), weight.positions, None, -1, FP16))
    weight = random_weight("fp8", 16, 64)
    eight, sixteen = (kernel.prepare(weight.spec(BF16), weight)["weight_packed"] for kernel in (KERNEL, FP8_A16))
    assert torch.equal(eight, pack_tiles(weight.values, weight.positions, None, -1, FP8))
    assert torch.equal(sixteen, pack_tiles(weight.values, weight.positions, None, -1, BF16))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_compiler_does_not_spill(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "csrc/cuda/mma_linear.cu"
    command = ["nvcc", "-std=c++17", "-O3", "-DNDEBUG", "-arch=sm_89", "-Xptxas=-v", "-c", str(source)]
    run = subprocess.run([*command, "-o", str(tmp_path / "mma.o")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert len(spills) >= 30 and set(spills) == {("0", "0")}


class Layer:
    """A weight prepared on the GPU, and its float64 reference."""

    def __init__(self, weight: Sparse24Weight, dtype: torch.dtype, kernel: CudaMmaKernel = KERNEL) -> None:
        self.spec, self.kernel = weight.spec(dtype), kernel
        self.packed = kernel.prepare(self.spec, weight.to(torch.device("cuda")))
        self.dense = weight.to_dense(torch.float64).cuda()

    def tokens(self, m: int) -> tuple[Tensor, Tensor | None]:
        """Return ``[m, k]`` activations as the kernel wants them, and their scales."""
        x = torch.randn(m, self.spec.k, device="cuda").to(self.spec.dtype)
        activation = self.spec.scheme.activation
        if self.kernel.quantizes_input or activation is None:
            return x, None
        return quantize_activations(x, activation, None)

    def run(self, x: Tensor, x_scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return self.kernel.apply(self.spec, self.packed, x, x_scale, bias)

    def check(self, x: Tensor, x_scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        y, want = self.run(x, x_scale, bias), x.double() @ self.dense.T
        want = want if x_scale is None else want * x_scale.double()
        want = want if bias is None else want + bias.double()
        assert y.shape == want.shape and y.dtype == self.spec.dtype
        assert (y.double() - want).norm() <= TOLERANCE[self.spec.dtype] * want.norm(), (self.spec, x.shape[0])


def make_layer(scheme: str, group_size: int, dtype: torch.dtype, n: int, k: int) -> Layer:
    return Layer(random_weight(scheme, n, k, group_size, dtype), dtype)


def make_fp8_a16(dtype: torch.dtype, n: int, k: int) -> Layer:
    return Layer(random_weight("fp8", n, k, -1, dtype), dtype, FP8_A16)


def random_bias(n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, device="cuda").to(dtype)


@gpu
@pytest.mark.parametrize(("scheme", "group_size", "dtype"), CASES)
def test_tile_edges(scheme: str, group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, bias = make_layer(scheme, group_size, dtype, 528, 1152), random_bias(528, dtype)
    for m in EDGES:
        layer.check(*layer.tokens(m), bias if m % 2 else None)


@gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_fp8_weights_with_16_bit_activations(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer, bias = make_fp8_a16(dtype, 528, 1152), random_bias(528, dtype)
    for m in EDGES:
        layer.check(*layer.tokens(m), bias if m % 2 else None)


@gpu
@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8", "w8a16"])
def test_every_number_of_tokens(scheme: str) -> None:
    torch.manual_seed(2)
    layer = make_layer(scheme, -1, BF16, 272, 640)
    x, x_scale = layer.tokens(300)
    for m in range(301):
        layer.check(x[:m], None if x_scale is None else x_scale[:m])


@gpu
@pytest.mark.parametrize(("scheme", "group_size", "dtype"), CASES)
def test_sizes_that_fill_no_tile(scheme: str, group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    for n, k in ((16, 32), (48, 128), (144, 96), (800, 4864), (4112, 2080)):
        if group_size != -1 and k % group_size:
            continue
        layer = make_layer(scheme, group_size, dtype, n, k)
        for m in (1, 9, 40, 130):
            layer.check(*layer.tokens(m), random_bias(n, dtype))


@gpu
@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8", "w8a16"])
def test_integers_are_exact(scheme: str) -> None:
    torch.manual_seed(4)
    weight = random_weight(scheme, 256, 512, dtype=FP16)
    small = torch.randint(-3, 4, weight.values.shape).to(weight.values.dtype)
    scales = None if weight.scales is None else torch.ones(256, 1)
    layer = Layer(dataclasses.replace(weight, values=small, scales=scales, layer="exact"), FP16)
    activation = weight.scheme.activation
    for m in (3, 12, 33, 64, 200):
        x = torch.randint(-1, 2, (m, 512), device="cuda").to(activation or FP16)
        y = layer.run(x, None if activation is None else torch.ones(m, 1, device="cuda"))
        assert torch.equal(y.double(), x.double() @ layer.dense.T)


@gpu
def test_the_largest_codes_do_not_overflow() -> None:
    weight = random_weight("int8", 64, 14336)
    lowest = torch.full_like(weight.values, -128)
    layer = Layer(dataclasses.replace(weight, values=lowest, scales=torch.full((64, 1), 1e-6), layer="low"), BF16)
    for m in (1, 100):
        x = torch.full((m, 14336), -128, dtype=torch.int8, device="cuda")
        layer.check(x, torch.ones(m, 1, device="cuda"))
    x = 1000 * torch.randn(20, 4096, device="cuda").half()
    weight = random_weight("w8a16", 64, 4096, dtype=FP16)
    Layer(dataclasses.replace(weight, scales=torch.full((64, 1), 1e-5), layer="large"), FP16).check(x)


@gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_code_is_widened_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(-128, 128).to(torch.int8)
    finite = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127].view(FP8)
    for kernel, scheme, values in ((KERNEL, "w8a16", codes), (FP8_A16, "fp8", finite)):
        weight = random_weight(scheme, 16, 512)
        row = torch.zeros(256, dtype=torch.uint8).view(values.dtype)
        row.view(torch.uint8)[: values.numel()] = values.view(torch.uint8)
        weight = dataclasses.replace(
            weight, values=row.expand(16, -1).contiguous(), scales=torch.ones(16, 1), layer="all"
        )
        layer = Layer(weight, dtype, kernel)
        y = layer.run(torch.eye(512, device="cuda", dtype=dtype))
        assert torch.equal(y.double(), layer.dense.T)


@gpu
@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8"])
def test_all_zero_patterns(scheme: str) -> None:
    masks = [mask for mask in range(16) if mask.bit_count() <= 2]
    dense = torch.zeros(16, 4 * 16, device="cuda")
    for row in range(16):
        for group in range(16):
            for i in range(4):
                dense[row, 4 * group + i] = (masks[(row + group) % 11] >> i & 1) * (1 + i)
    dtype = get_scheme(scheme).value_dtypes[0]
    stored = torch.where(dense == 0, -torch.zeros_like(dense), dense).to(dtype)
    scales = None if scheme == "bf16" else torch.ones(16, 1, device="cuda")
    weight = Sparse24Weight.from_dense(stored.cpu(), get_scheme(scheme), None if scales is None else scales.cpu())
    layer = Layer(weight, BF16)
    identity = torch.eye(64, device="cuda").to(get_scheme(scheme).activation or BF16)
    y = layer.run(identity, None if scales is None else torch.ones(64, 1, device="cuda"))
    assert torch.equal(y.float(), dense.T)


@gpu
def test_static_scale() -> None:
    torch.manual_seed(5)
    for scheme in ("int8", "fp8"):
        layer = make_layer(scheme, -1, BF16, 144, 256)
        x, _ = layer.tokens(20)
        layer.check(x, torch.full((1,), 0.03, device="cuda"))


@gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("static", [False, True])
def test_activations_with_a_zero_point(static: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(9)
    weight = dataclasses.replace(random_weight("int8", 528, 1152), symmetric_input=False)
    if static:
        zero = torch.tensor([-77], dtype=torch.int32)
        weight = dataclasses.replace(weight, input_scale=torch.tensor([0.03]), input_zero=zero)
    layer, bias = Layer(weight, dtype), random_bias(528, dtype)
    for m in EDGES:
        x = torch.randn(m, 1152, device="cuda") + 2 * (torch.arange(m, device="cuda") % 3 - 1)[:, None]
        codes, scale, zeros = quantize_asymmetric(x, layer.packed.get("input_scale"), layer.packed.get("input_zero"))
        y = KERNEL.apply(layer.spec, layer.packed, codes, scale, bias, zeros)
        want = (codes - zeros).double() @ layer.dense.T * scale.double() + bias.double()
        assert (y.double() - want).norm() <= TOLERANCE[dtype] * want.norm(), m


@gpu
@pytest.mark.parametrize(("scheme", "group_size"), [("bf16", -1), ("int8", -1), ("fp8", -1), ("w8a16", 128)])
def test_repeats_side_streams_and_graphs_are_bitwise_equal(scheme: str, group_size: int) -> None:
    torch.manual_seed(6)
    layer = make_layer(scheme, group_size, BF16, 768, 2048)
    for m in (1, 16, 50, 256):
        x, x_scale = layer.tokens(m)
        y = layer.run(x, x_scale)
        assert all(torch.equal(layer.run(x, x_scale), y) for _ in range(100))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = layer.run(x, x_scale)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(beside, y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer.run(x, x_scale)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, y)


@gpu
def test_dependent_launches_wait_for_their_input() -> None:
    torch.manual_seed(7)
    layer = make_layer("bf16", -1, BF16, 1024, 1024)
    for m in (1, 16, 64, 128):
        x = torch.randn(m, 1024, device="cuda").bfloat16()
        apart = together = x
        for _ in range(8):
            apart = layer.run(apart)
            torch.cuda.synchronize()
        for _ in range(8):
            together = layer.run(together)
        assert torch.equal(together, apart)


@gpu
def test_strided_tokens_no_tokens_and_nan() -> None:
    torch.manual_seed(8)
    layer = make_layer("bf16", -1, BF16, 64, 160)
    wide = torch.randn(20, 320, device="cuda").bfloat16()
    layer.check(wide[:, 160:])
    layer.check(wide.flatten()[4 : 4 + 5 * 160].view(5, 160))  # not 16-byte aligned
    assert layer.run(wide[:0, :160]).shape == (0, 64)
    x = wide[:, :160].contiguous()
    x[3] = float("nan")
    y = layer.run(x)
    assert y[3].isnan().all() and not y[torch.arange(20, device="cuda") != 3].isnan().any()


@gpu
@pytest.mark.parametrize(("scheme", "group_size", "dtype"), CASES)
def test_packs_on_the_gpu_as_on_the_cpu(scheme: str, group_size: int, dtype: torch.dtype) -> None:
    weight = random_weight(scheme, 272, 1152, group_size, dtype)
    on_cpu = KERNEL.prepare(weight.spec(dtype), weight)["weight_packed"]
    on_gpu = KERNEL.prepare(weight.spec(dtype), weight.to(torch.device("cuda")))["weight_packed"]
    assert torch.equal(on_cpu, on_gpu.cpu())
