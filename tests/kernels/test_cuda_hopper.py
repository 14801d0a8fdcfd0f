"""The Hopper kernels against float64; packing against the layout's own words, which needs no GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_sparse.kernels import cuda_hopper
from vllm_sparse.kernels.base import Kernel
from vllm_sparse.kernels.cuda_hopper import ELEMENTS, CudaBf16Kernel, CudaFp8Kernel, CudaInt8Kernel, pack_bricks
from vllm_sparse.kernels.reference import quantize_asymmetric
from vllm_sparse.native import pointer
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import Sparse24Weight

FP8, INT8, BF16, FP16 = ELEMENTS
KERNELS: dict[torch.dtype, Kernel] = {FP8: CudaFp8Kernel(), INT8: CudaInt8Kernel()}
KERNELS |= dict.fromkeys((BF16, FP16), CudaBf16Kernel())
PAIRS = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
# Rounding to bf16 (2^-9 at most, 2^-10 or so on average) dominates; the tensor cores' own rounding of sums adds less.
TOLERANCE = 3e-3
EDGES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 144, 145, 160, 161, 192)
EDGES += (255, 256, 257, 288, 289, 300, 320, 321, 511, 512, 1025)
INSTRUCTIONS = {"fp8": "QGMMA", "int8": "IGMMA", "bf16": "HGMMA", "fp16": "HGMMA"}
UNITS = {FP8: "fp8", INT8: "int8", BF16: "bf16", FP16: "fp16"}
every_element = pytest.mark.parametrize("element", ELEMENTS, ids=UNITS.values())


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and cuda_hopper._cuda is not None


gpu = pytest.mark.skipif(not hopper(), reason="needs a GPU of compute capability 9.0 and vllm_sparse._cuda")


def random_codes(shape: tuple[int, int], element: torch.dtype, seed: int, integers: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-2, 3, shape, generator=generator).to(element)
    if element == INT8:
        return torch.randint(-127, 128, shape, generator=generator).to(element)
    return torch.randn(shape, generator=generator).to(element)


def random_weight(
    n: int, k: int, element: torch.dtype = FP8, seed: int = 0, integers: bool = False, static: bool = False
) -> Sparse24Weight:
    values = random_codes((n, k // 2), element, seed, integers)
    generator = torch.Generator().manual_seed(seed + 1)
    pairs = PAIRS[torch.randint(0, 6, (n, k // 4), generator=generator)]
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=4)
    positions = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    if values.element_size() == 2:
        return Sparse24Weight(get_scheme("bf16"), values, positions)
    scales = torch.ones(n, 1) if integers else torch.rand(n, 1, generator=generator) * 0.02 + 0.01
    input_scale = torch.tensor([0.03]) if static else None
    return Sparse24Weight(get_scheme(UNITS[element]), values, positions, scales, -1, input_scale)


def codes(
    m: int, k: int, element: torch.dtype = FP8, seed: int = 1, integers: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return x and, for elements that have them, its scales."""
    x = random_codes((m, k), element, seed, integers)
    if x.element_size() == 2:
        return x, None
    generator = torch.Generator().manual_seed(seed)
    return x, torch.ones(m, 1) if integers else torch.rand(m, 1, generator=generator) * 0.1 + 0.01


def exact(weight: Sparse24Weight, x: Tensor, x_scale: Tensor | None, bias: Tensor | None = None) -> Tensor:
    out = x.double() @ weight.to_dense(torch.float64).T
    if x_scale is not None:
        out = out * x_scale.double()
    return out if bias is None else out + bias.double()


class Layer:
    """A packed weight on the GPU."""

    def __init__(self, weight: Sparse24Weight, dtype: torch.dtype = BF16, device: str = "cuda") -> None:
        self.weight = weight.to(device)
        values = weight.values.dtype
        self.kernel = KERNELS[values]
        self.spec = self.weight.spec(values if values in (BF16, FP16) else dtype)
        self.packed = self.kernel.prepare(self.spec, self.weight)

    def __call__(self, x: Tensor, x_scale: Tensor | None, bias: Tensor | None = None) -> Tensor:
        x, scale, bias = self._here(x), self._here(x_scale), self._here(bias)
        return self.kernel.apply(self.spec, self.packed, x, scale, bias)

    def error(self, x: Tensor, x_scale: Tensor | None, bias: Tensor | None = None) -> float:
        want = exact(self.weight, self._here(x), self._here(x_scale), self._here(bias))
        got = self(x, x_scale, bias)
        assert got.shape == want.shape
        assert got.dtype == self.spec.dtype
        return float((got.double() - want).norm() / want.norm())

    def _here(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.weight.device)


def samples(n: int, k: int) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(2)
    rows, columns = (torch.randint(0, limit, (300,), generator=generator).tolist() for limit in (n, k))
    return list(zip(rows, columns, strict=True))


@pytest.mark.parametrize("element", [FP8, INT8])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (80, 96), (128, 1056), (16, 32)])
def test_bricks_of_8_bits_hold_every_value_and_position_where_the_kernel_looks(
    n: int, k: int, element: torch.dtype
) -> None:
    weight = random_weight(n, k, element)
    bricks = pack_bricks(weight.values, weight.positions)
    assert list(bricks.shape) == [-(-n // 64), -(-k // 256) * 2, 5120]
    values, nibbles = weight.values.view(torch.uint8), weight.nibbles()
    for row, column in samples(n, k):
        step, rest = column // 64, column % 64
        brick = bricks[row // 64, column // 128]
        r, kept = row % 64, rest // 2  # of the step's 32 kept values
        place = step % 2 * 2048 + r // 8 * 256 + kept // 16 * 128 + r % 8 * 16 + kept % 16
        assert brick[place] == values[row, column // 2]
        thread = r // 16 * 32 + r % 8 * 4 + rest // 32 * 2 + r % 16 // 8
        byte = brick[4096 + thread * 8 + step % 2 * 4 + rest % 32 // 8]
        assert (byte >> (column // 4 % 2 * 4)) & 15 == nibbles[row, column // 4]


@pytest.mark.parametrize("element", [BF16, FP16])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (80, 48), (128, 528), (16, 16)])
def test_bricks_of_16_bits_hold_every_value_and_position_where_the_kernel_looks(
    n: int, k: int, element: torch.dtype
) -> None:
    weight = random_weight(n, k, element)
    bricks = pack_bricks(weight.values, weight.positions)
    assert list(bricks.shape) == [-(-n // 64), -(-k // 128) * 2, 4608]
    values, nibbles = weight.values.view(torch.int16), weight.nibbles()
    for row, column in samples(n, k):
        step, rest = column // 32, column % 32
        brick = bricks[row // 64, column // 64]
        r, kept = row % 64, rest // 2  # of the step's 16 kept values
        place = step % 2 * 1024 + r // 8 * 128 + kept // 8 * 64 + r % 8 * 8 + kept % 8
        assert brick[:4096].view(torch.int16)[place] == values[row, column // 2]
        thread = r // 16 * 32 + r % 8 * 4 + step % 2 * 2 + rest // 16
        byte = brick[4096 + thread * 4 + r % 16 // 8 * 2 + rest % 16 // 8]
        assert (byte >> (column // 4 % 2 * 4)) & 15 == nibbles[row, column // 4]


@every_element
def test_padding_multiplies_by_zero_with_valid_positions(element: torch.dtype) -> None:
    weight = random_weight(16, 32, element)
    bricks = pack_bricks(weight.values, weight.positions)
    assert int((bricks[..., :4096] != 0).sum()) == int((weight.values.view(torch.uint8) != 0).sum())
    assert int((bricks[..., 4096:] != 0x44).sum()) == int((weight.positions != 0x44).sum())


def test_a_16_bit_weight_takes_the_type_of_the_activations() -> None:
    weight = random_weight(64, 128, BF16)
    packed = KERNELS[BF16].prepare(weight.spec(FP16), weight)
    want = pack_bricks(weight.values.half(), weight.positions)
    assert torch.equal(packed["weight_packed"], want)
    assert list(packed) == ["weight_packed"]


@pytest.mark.parametrize(
    ("element", "change", "sentence"),
    [
        (FP8, {"n": 24}, "needs n a multiple of 16 and k of 32, not n=24 and k=256"),
        (INT8, {"k": 48}, "needs n a multiple of 16 and k of 32, not n=64 and k=48"),
        (BF16, {"k": 40}, "needs n a multiple of 16 and k of 16, not n=64 and k=40"),
        (FP8, {"dtype": torch.float32}, "writes bfloat16 or float16, not torch.float32"),
        (FP8, {"scheme": get_scheme("int8")}, "runs scheme fp8, not int8"),
        (INT8, {"scheme": get_scheme("fp8")}, "runs scheme int8, not fp8"),
        (BF16, {"scheme": get_scheme("fp8")}, "runs scheme bf16, not fp8"),
    ],
)
def test_says_what_it_cannot_run(
    element: torch.dtype, change: dict[str, object], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_hopper, "_cuda", object())
    spec = dataclasses.replace(random_weight(64, 256, element).spec(BF16), **change)
    assert KERNELS[element].reason_against(spec, torch.device("cuda")) == sentence


def test_says_that_it_needs_a_cuda_device_and_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = random_weight(64, 256).spec(BF16)
    assert KERNELS[FP8].reason_against(spec, torch.device("cpu")) == "runs on CUDA devices, not on cpu"
    monkeypatch.setattr(cuda_hopper, "_cuda", None)
    monkeypatch.setattr(cuda_hopper, "_IMPORT_ERROR", "no such file", raising=False)
    reason = KERNELS[FP8].reason_against(spec, torch.device("cuda"))
    assert reason == "the extension module vllm_sparse._cuda is not built (no such file)"


def cuobjdump() -> str | None:
    """Return the toolkit's, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    folders = [] if triton is None or triton.origin is None else [Path(triton.origin).parent / "backends/nvidia/bin"]
    return shutil.which("cuobjdump") or next((p for f in folders if (p := shutil.which("cuobjdump", path=f))), None)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("unit", UNITS.values())
def test_the_compiler_neither_spills_nor_serializes(unit: str, tmp_path: Path) -> None:
    """Registers in local memory, or multiplications that wait for each other, would pass every other test."""
    source = Path(__file__).parents[2] / "csrc" / "cuda" / f"hopper_{unit}.cu"
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-O3", "-DNDEBUG", "-std=c++17", "-Xptxas=-v", "-cubin"]
    command = ["nvcc", *flags, "-o", str(tmp_path / "kernels.cubin"), str(source)]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "serialized" not in log
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= 10
    assert set(spills) == {("0", "0")}
    disassembler = cuobjdump()
    if disassembler is None:
        pytest.skip("no spills and nothing serialized; cuobjdump, which shows the instructions, is not installed")
    command = [disassembler, "-sass", str(tmp_path / "kernels.cubin")]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = sass.split("Function : ")[1:]
    assert len(functions) == len(spills)
    assert all(f"{INSTRUCTIONS[unit]}.SP." in function for function in functions)
    assert not re.search(r"\b(LDL|STL)\b", sass)  # local memory


@pytest.mark.skipif(cuda_hopper._cuda is None, reason="vllm_sparse._cuda is not built")
@every_element
class TestChoice:
    """Configurations are data: they can be read where there is no GPU."""

    @staticmethod
    def tokens(element: torch.dtype, m: int, n: int, k: int, multiprocessors: int = 132) -> int:
        module, number = cuda_hopper._cuda, ELEMENTS.index(element)
        chosen = module.hopper_choose_configuration(number, m, n, k, multiprocessors)
        return module.hopper_configuration_tokens(number, chosen)

    @pytest.mark.parametrize("m", EDGES)
    def test_up_to_192_tokens_are_one_tile_with_the_fewest_tokens_that_hold_them(
        self, element: torch.dtype, m: int
    ) -> None:
        tokens = self.tokens(element, m, 4096, 4096)
        assert tokens >= min(m, 64)
        tiles = (16, 32, 64, 96, 128, 144, 160, 192)
        tiles = (8, *tiles) if element in (FP8, INT8) else tiles
        assert m > 192 or tokens == min(t for t in tiles if t >= m)

    def test_many_tokens_take_the_largest_tile(self, element: torch.dtype) -> None:
        assert self.tokens(element, 4096, 28672, 4096) == 256

    @pytest.mark.parametrize("multiprocessors", [1, 78, 132, 148])
    def test_any_size_and_any_device_has_a_configuration(self, element: torch.dtype, multiprocessors: int) -> None:
        for m in (1, 100, 193, 100_000):
            for n, k in ((16, 32), (4096, 14336), (152_064, 8192)):
                assert self.tokens(element, m, n, k, multiprocessors) >= 8


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
def test_activations_with_a_zero_point(static: bool) -> None:
    weight = dataclasses.replace(random_weight(208, 608, INT8), symmetric_input=False)
    if static:
        zero = torch.tensor([-77], dtype=torch.int32)
        weight = dataclasses.replace(weight, input_scale=torch.tensor([0.03]), input_zero=zero)
    layer = Layer(weight)
    for m in EDGES:
        x = torch.randn(m, 608, device="cuda") + 2 * (torch.arange(m, device="cuda") % 3 - 1)[:, None]
        operand = quantize_asymmetric(x, layer.packed.get("input_scale"), layer.packed.get("input_zero"))
        bias = torch.randn(208, device="cuda").to(BF16)
        got = layer.kernel.apply(layer.spec, layer.packed, operand[0], operand[1], bias, operand[2])
        want = exact(layer.weight, operand[0] - operand[2], operand[1], bias)
        assert (got.double() - want).norm() <= TOLERANCE * want.norm(), m


def run_configuration(layer: Layer, index: int, x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None) -> Tensor:
    """Run one entry of the table, in scratch memory and an output of any content."""
    module, number = cuda_hopper._cuda, ELEMENTS.index(x.dtype)
    (m, k), n = x.shape, layer.spec.n
    out = torch.full((m, n), float("nan"), dtype=layer.spec.dtype, device="cuda")
    scratch = torch.full((module.hopper_scratch_bytes(number, m, n, k, 132, index),), 255, dtype=torch.uint8).cuda()
    module.hopper_linear(
        number, x.data_ptr(), k * x.element_size(), pointer(x_scale), pointer(x_zero), m > 1,
        layer.packed["weight_packed"].data_ptr(), pointer(layer.packed.get("weight_scale")),
        pointer(layer.packed.get("weight_sum")), 0, out.data_ptr(), False, m, n, k, 0,
        scratch.data_ptr(), index, m % 2 == 0, torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    return out


def run_exactly(layer: Layer, index: int, m: int, element: torch.dtype) -> None:
    """Compare one entry of the table with exact sums of small integers."""
    x, x_scale = (None if t is None else t.cuda() for t in codes(m, layer.spec.k, element, integers=True))
    zeros = layer.packed.get("weight_sum")
    x_zero = None if zeros is None else torch.randint(-3, 4, (m, 1), device="cuda", dtype=torch.int32)
    moved = x if x_zero is None else x - x_zero
    out = run_configuration(layer, index, x, x_scale, x_zero)
    assert torch.equal(out, exact(layer.weight, moved, x_scale).to(out.dtype)), (index, m)


@gpu
@pytest.mark.gpu
@every_element
class TestOnGpu:
    def test_every_m(self, element: torch.dtype) -> None:
        layer = Layer(random_weight(208, 608, element))
        for m in range(1, 301):
            assert layer.error(*codes(m, 608, element, seed=m)) < TOLERANCE, m

    @pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 96), (800, 160), (1040, 896), (4096, 4096), (3584, 18944)])
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    def test_shapes_with_bias(self, n: int, k: int, dtype: torch.dtype, element: torch.dtype) -> None:
        layer = Layer(random_weight(n, k, element, seed=n + k), dtype)
        bias = torch.randn(n).to(layer.spec.dtype)
        for m in EDGES if n < 2000 else EDGES[::4]:
            assert layer.error(*codes(m, k, element, seed=m), bias) < TOLERANCE, m

    def test_every_configuration_is_exact_on_integers(self, element: torch.dtype) -> None:
        """Sums of small integers are exact in every type: one wrong position or token shows."""
        weight = random_weight(336, 1184, element, integers=True)
        if element == INT8:
            weight = dataclasses.replace(weight, symmetric_input=False)
        layer = Layer(weight)
        for index in range(cuda_hopper._cuda.hopper_configurations(ELEMENTS.index(element))):
            tokens = cuda_hopper._cuda.hopper_configuration_tokens(ELEMENTS.index(element), index)
            for m in sorted({1, tokens - 1, tokens, tokens + 1, 3 * tokens + 5}):
                run_exactly(layer, index, m, element)

    def test_what_whole_rounds_leave_is_exact_and_repeatable(self, element: torch.dtype) -> None:
        """Sixty-nine tiles of 256 features: one more round than clusters can have, of which columns may be shared."""
        integers = Layer(random_weight(69 * 256, 288, element, integers=True))
        layer = Layer(random_weight(69 * 256, 288, element))
        module, number = cuda_hopper._cuda, ELEMENTS.index(element)
        for index in range(module.hopper_configurations(number)):
            tokens = module.hopper_configuration_tokens(number, index)
            for m in {tokens, tokens + 1} if tokens >= 128 else ():
                run_exactly(integers, index, m, element)
                x, x_scale = (None if t is None else t.cuda() for t in codes(m, 288, element))
                want = run_configuration(layer, index, x, x_scale, None)
                for _ in range(10):
                    assert torch.equal(run_configuration(layer, index, x, x_scale, None), want), (index, m)

    def test_rows_with_a_stride(self, element: torch.dtype) -> None:
        layer = Layer(random_weight(256, 512, element, static=True))
        x, scale = codes(33, 1024, element)
        scale = None if scale is None else torch.tensor([0.03])
        assert layer.error(x.cuda()[:, :512], scale) < TOLERANCE
        assert layer.error(x.cuda()[:, 4:516], scale) < TOLERANCE  # not aligned: copied

    def test_zero_tokens(self, element: torch.dtype) -> None:
        assert Layer(random_weight(64, 256, element))(*codes(0, 256, element)).shape == (0, 64)

    def test_zero_patterns_and_negative_zeros(self, element: torch.dtype) -> None:
        patterns = [mask for mask in range(16) if mask.bit_count() <= 2]  # the 11 patterns of a 2:4 group
        groups = torch.tensor([[mask >> i & 1 for i in range(4)] for mask in patterns], dtype=torch.float32)
        picks = torch.randint(0, len(patterns), (64, 64), generator=torch.Generator().manual_seed(3))
        kept = groups[picks].flatten(1)
        numbers = random_codes((64, 256), element, seed=4, integers=False).float()
        dense = (kept * numbers + (1 - kept) * -0.0).to(element)
        scheme = random_weight(16, 32, element).scheme
        weight = Sparse24Weight.from_dense(dense, scheme, torch.ones(64, 1) if scheme.scaled else None)
        assert Layer(weight).error(*codes(5, 256, element)) < TOLERANCE

    def test_largest_values_and_nan(self, element: torch.dtype) -> None:
        """The largest products add up without wrapping; NaN stays in its own feature."""
        weight = random_weight(64, 256, element)
        largest = {FP8: 448.0, INT8: -128.0, BF16: 2.0**60, FP16: 16.0}[element]
        values = weight.values.float()
        values[0] = largest
        if element != INT8:
            values[1, 0] = float("nan")
        layer = Layer(dataclasses.replace(weight, values=values.to(element)))
        scale = 1.0 if weight.scales is None else float(weight.scales[0])
        out = layer(torch.full((3, 256), largest).to(element), None if weight.scales is None else torch.ones(3, 1))
        want = torch.tensor(largest * largest * 128 * scale, device="cuda")
        assert torch.allclose(out[:, 0].float(), want, rtol=1e-2)
        assert bool(out[:, 1].isnan().all()) == (element != INT8)
        assert not bool(out[:, 2:].isnan().any())

    @pytest.mark.parametrize("m", [1, 16, 64, 100, 256, 700])
    def test_repeats_are_bitwise_equal(self, m: int, element: torch.dtype) -> None:
        layer = Layer(random_weight(1024, 2048, element))
        x, x_scale = codes(m, 2048, element)
        x, x_scale = x.cuda(), None if x_scale is None else x_scale.cuda()
        want = layer(x, x_scale)
        assert all(torch.equal(layer(x, x_scale), want) for _ in range(100))

    def test_dependent_launches_in_a_graph_and_on_a_side_stream(self, element: torch.dtype) -> None:
        """Each layer reads what the one before wrote, so a launch that starts too early shows."""
        layer = Layer(random_weight(512, 512, element))
        x, x_scale = codes(24, 512, element)
        x, x_scale = x.cuda(), None if x_scale is None else x_scale.cuda()

        def chain(x: Tensor) -> Tensor:
            for _ in range(20):
                wide = layer(x, x_scale).float()
                x = (wide / wide.abs().amax() * 100).to(element)
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

    def test_columns_shared_by_clusters_on_two_streams_at_once(self, element: torch.dtype) -> None:
        """One cluster waits for another one, in scratch memory of any content: also when kernels compete."""
        layer = Layer(random_weight(4096, 14336, element))
        assert cuda_hopper._scratch_bytes(0, ELEMENTS.index(element), 256, 4096, 14336) > 0
        x, x_scale = codes(256, 14336, element)
        x, x_scale = x.cuda(), None if x_scale is None else x_scale.cuda()
        assert layer.error(x, x_scale) < TOLERANCE
        want = layer(x, x_scale)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [layer(x, x_scale) for _ in range(3)]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        got = []
        for _ in range(50):
            for stream in streams:
                with torch.cuda.stream(stream):
                    got.append(layer(x, x_scale))
            graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out in got + captured)

    def test_second_device(self, element: torch.dtype) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        layer = Layer(random_weight(320, 512, element), device="cuda:1")
        first = Layer(random_weight(320, 512, element))
        stream = torch.cuda.Stream("cuda:1")
        for m in (1, 40, 300):
            x, x_scale = codes(m, 512, element)
            assert layer.error(x, x_scale) < TOLERANCE
            here, there = first(x, x_scale), layer(x, x_scale)
            assert torch.equal(here.cpu(), there.cpu())
            stream.wait_stream(torch.cuda.current_stream("cuda:1"))
            with torch.cuda.stream(stream):
                aside = layer(x, x_scale)
            stream.synchronize()
            assert torch.equal(aside, there)
        assert torch.cuda.current_device() == 0

    def test_op_is_sound(self, element: torch.dtype) -> None:
        layer = Layer(random_weight(64, 256, element))
        x, x_scale = codes(4, 256, element)
        x, x_scale = x.cuda(), None if x_scale is None else x_scale.cuda()
        packed = layer.packed["weight_packed"], layer.packed.get("weight_scale"), layer.packed.get("weight_sum")
        arguments = (x, x_scale, None, *packed, None, 64, BF16 if element in (FP8, INT8) else element)
        # test_schema compares inputs by arithmetic that torch does not have for fp8.
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.vllm_sparse.hopper_linear.default, arguments, test_utils=checks)
