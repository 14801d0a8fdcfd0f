"""The W4A16 kernels against float64; packing against the fragments' definition, which needs no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vllm_sparse.kernels import cuda_w4a16
from vllm_sparse.kernels.cuda_w4a16 import CudaW4A16Kernel, interleave_halves, pack_panels
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import LinearSpec, Sparse24Weight

KERNEL = CudaW4A16Kernel()
PAIRS = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
# Rounding of the result and, on Hopper, of code * scale: each 2^-9 (bf16) or 2^-12 (fp16) at most, half of it in the
# mean square.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
EDGES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 191, 255, 256, 257, 300, 511, 513, 1025)


def usable() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) and cuda_w4a16._cuda is not None


gpu = pytest.mark.skipif(not usable(), reason="needs a GPU of compute capability 8.0 and vllm_sparse._cuda")


def random_weight(n: int, k: int, group_size: int, dtype: torch.dtype, seed: int = 0) -> Sparse24Weight:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (n, k // 2), generator=generator).to(torch.int8)
    pairs = PAIRS[torch.randint(0, 6, (n, k // 4), generator=generator)]
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).to(torch.uint8)
    groups = 1 if group_size == -1 else k // group_size
    scales = (torch.rand(n, groups, generator=generator) * 0.02 + 0.005).to(dtype)
    return Sparse24Weight(get_scheme("w4a16"), values, nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scales, group_size)


def lanes() -> Iterator[tuple[int, int, int]]:
    for lane in range(32):
        yield lane, lane // 4, lane % 4


@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 32, -1), (48, 160, 32), (272, 256, 128), (288, 192, 64)])
def test_packing_follows_the_fragments(n: int, k: int, group_size: int) -> None:
    weight = random_weight(n, k, group_size, torch.float16)
    scales = weight.scales if group_size != -1 else None
    packed = pack_panels(weight.values, weight.positions, scales, group_size)
    steps, groups = -(-k // 128), 0 if scales is None else 128 // group_size
    size = 768 + 32 * groups
    assert packed.numel() == n // 16 * steps * size
    codes = torch.zeros(n, steps * 64, dtype=torch.int64)
    positions = torch.zeros(n, steps * 32, dtype=torch.int64)
    for block in range(n // 16):
        panel, inside = block // 16, block % 16
        in_panel = min(16, n // 16 - 16 * panel)
        for step in range(steps):
            at = (16 * panel * steps + step * in_panel + inside) * size
            words = packed[at : at + 768].view(torch.int32).tolist()
            for lane, g, t in lanes():
                for unit in range(4):
                    word = words[4 * lane + unit]
                    for register in range(4):
                        row = 16 * block + g + 8 * (register % 2)
                        column = 64 * step + 16 * unit + 8 * (register // 2) + 2 * t
                        codes[row, column] = (word >> 4 * register & 15) - 8
                        codes[row, column + 1] = (word >> 16 + 4 * register & 15) - 8
                for pair in range(2):
                    word = words[128 + 2 * lane + pair]
                    group = 32 * step + 8 * (2 * pair + t // 2) + 4 * (t % 2)
                    for i in range(4):
                        positions[16 * block + g, group + i] = word >> 4 * i & 15
                        positions[16 * block + g + 8, group + i] = word >> 16 + 4 * i & 15
            if scales is not None:
                stored = packed[at + 768 : at + size].view(torch.float16).view(8, groups, 2)
                wanted = scales[16 * block : 16 * block + 16, step * groups : (step + 1) * groups]
                rows = torch.cat((stored[:, :, 0], stored[:, :, 1]))
                torch.testing.assert_close(rows[:, : wanted.shape[1]], wanted, rtol=0, atol=0)
                assert not rows[:, wanted.shape[1] :].any()
    torch.testing.assert_close(codes[:, : k // 2], weight.values.long(), rtol=0, atol=0)
    assert not codes[:, k // 2 :].any()
    nibbles = torch.stack((weight.positions & 15, weight.positions >> 4), -1).flatten(1).long()
    torch.testing.assert_close(positions[:, : k // 4], nibbles, rtol=0, atol=0)
    assert (positions[:, k // 4 :] == 4).all()


def test_prepare_keeps_channel_scales_apart_and_rounds_group_scales() -> None:
    weight = random_weight(32, 128, -1, torch.float16)
    packed = KERNEL.prepare(weight.spec(torch.bfloat16), weight)
    assert packed["channel_scale"].dtype == torch.float32 and packed["channel_scale"].shape == (32,)
    assert packed["weight_packed"].numel() == 2 * 768
    grouped = random_weight(32, 128, 32, torch.float32)
    packed = KERNEL.prepare(grouped.spec(torch.bfloat16), grouped)
    assert set(packed) == {"weight_packed"} and packed["weight_packed"].numel() == 2 * (768 + 128)


def test_a_gated_layer_has_its_halves_interleaved() -> None:
    weight = random_weight(48, 256, 128, torch.bfloat16)
    assert interleave_halves(torch.arange(48))[:16].tolist() == [*range(8), *range(24, 32)]
    assert interleave_halves(torch.arange(48))[32:].tolist() == [*range(16, 24), *range(40, 48)]
    assert weight.scales is not None
    rows = [interleave_halves(tensor) for tensor in (weight.values, weight.positions, weight.scales)]
    spec = dataclasses.replace(weight.spec(torch.bfloat16), gated=True)
    assert torch.equal(KERNEL.prepare(spec, weight)["weight_packed"], pack_panels(*rows, 128))


def spec(**changes: object) -> LinearSpec:
    base = LinearSpec(get_scheme("w4a16"), 64, 128, 128, torch.bfloat16, torch.bfloat16)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_reasons_against(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(cuda_w4a16, "_cuda", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert KERNEL.reason_against(spec(), torch.device("cpu")) == "runs on CUDA devices, not on cpu"
    assert KERNEL.reason_against(spec(scheme=get_scheme("fp8")), device) == "runs scheme w4a16, not fp8"
    reason = KERNEL.reason_against(spec(dtype=torch.float32), device)
    assert reason == "takes bfloat16 or float16 activations, not torch.float32"
    assert KERNEL.reason_against(spec(n=72), device) == "needs n a multiple of 16 and k of 32, not n=72 and k=128"
    assert KERNEL.reason_against(spec(), device) == "needs compute capability 8.0, this device has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert KERNEL.reason_against(spec(), device) is None


def test_two_capturing_streams_have_workspaces_of_their_own_and_hopper_needs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, first, second = torch.device("cuda", 0), torch.empty(1), torch.empty(2)
    monkeypatch.setattr(cuda_w4a16, "_workspaces", {(0, -1): first, (0, -2): second})
    monkeypatch.setattr(cuda_w4a16, "_captured", {})
    got = [cuda_w4a16._graph_workspace(device, stream) for stream in (7, 8, 7, 9, 10, 8)]
    assert [id(w) for w in got] == [id(w) for w in (first, second, first, first, first, second)]
    monkeypatch.setattr(cuda_w4a16, "_device", lambda index: (132, 90))
    assert cuda_w4a16._workspace(device) is None


class Layer:
    """A weight prepared on the GPU, and its float64 reference."""

    def __init__(self, weight: Sparse24Weight, dtype: torch.dtype, gated: bool = False) -> None:
        self.spec = dataclasses.replace(weight.spec(dtype), gated=gated)
        self.packed = KERNEL.prepare(self.spec, weight.to(torch.device("cuda")))
        self.dense = weight.to_dense(torch.float64).cuda()

    def run(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return KERNEL.apply(self.spec, self.packed, x, None, bias)

    def run_gated(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight, scale = self.packed["weight_packed"], self.packed.get("channel_scale")
        return torch.ops.vllm_sparse.w4a16_linear_silu_multiply(
            x, weight, scale, bias, self.spec.n, self.spec.group_size
        )

    def check(self, x: Tensor, bias: Tensor | None = None) -> None:
        y, want = self.run(x, bias), x.double() @ self.dense.T
        want = want if bias is None else want + bias.double()
        assert y.shape == want.shape and y.dtype == x.dtype
        assert (y.double() - want).norm() <= TOLERANCE[x.dtype] * want.norm()


@gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_tile_edges(group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Layer(random_weight(528, 1152, group_size, dtype), dtype)
    x, bias = torch.randn(max(EDGES), 1152, dtype=dtype, device="cuda"), torch.randn(528, dtype=dtype, device="cuda")
    for m in EDGES:
        layer.check(x[:m], bias if m % 2 else None)


@gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("n", "group_size"), [(528, 128), (528, 32), (560, -1), (28672, 128), (33920, -1)])
def test_interleaved_halves_and_their_product(n: int, group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(12)
    layer = Layer(random_weight(n, 1152, group_size, dtype), dtype, gated=True)
    x, bias = torch.randn(300, 1152, dtype=dtype, device="cuda"), torch.randn(n, dtype=dtype, device="cuda")
    for m in (0, *(m for m in EDGES if m <= 300)):
        given = bias if m % 2 else None
        if m:
            layer.check(x[:m], given)
        gate, up = layer.run(x[:m], given).float().chunk(2, 1)
        want = torch.nn.functional.silu(gate).to(dtype).float() * up
        y = layer.run_gated(x[:m], given)
        assert y.shape == (m, n // 2) and y.dtype == dtype
        # Each rounding may go the other way where the exponential does in its last bit.
        torch.testing.assert_close(y.float(), want.to(dtype).float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert all(torch.equal(layer.run_gated(x[:m], given), y) for _ in range(5))


@gpu
def test_every_number_of_tokens() -> None:
    torch.manual_seed(1)
    layer = Layer(random_weight(272, 640, 128, torch.bfloat16), torch.bfloat16)
    x = torch.randn(300, 640, dtype=torch.bfloat16, device="cuda")
    want = x.double() @ layer.dense.T
    for m in range(301):
        y = layer.run(x[:m])
        assert (y.double() - want[:m]).norm() <= TOLERANCE[x.dtype] * want[:m].norm(), m


@gpu
@pytest.mark.parametrize(("n", "k"), [(1040, 2048), (16896, 512)])  # columns cut into slices, whole columns
def test_tokens_that_fill_no_tile(n: int, k: int) -> None:
    torch.manual_seed(11)
    layer = Layer(random_weight(n, k, 128, torch.bfloat16), torch.bfloat16)
    poison = torch.full((128, k), torch.nan, dtype=torch.bfloat16, device="cuda")
    for m in (5, 9, 13, 15, 17, 33, 63, 65, 66, 95, 97, 127, 129, 130, 191, 193, 255, 257, 287, 300):
        x = torch.cat((poison, torch.randn(m, k, device="cuda").bfloat16(), poison))[128:-128]
        tile = next((size for size in (8, 16, 32, 64, 96) if m <= size), 128)
        layer.run(poison[:tile])  # what stays in shared memory must not come out
        layer.check(x)
        y = layer.run(x)  # tokens of two tiles are stored twice
        assert all(torch.equal(layer.run(x), y) for _ in range(20))


@gpu
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [(16, 32, 32), (16, 64, -1), (48, 128, 128), (800, 4864, 128), (1040, 96, 32), (4112, 2080, 32)],
)
def test_sizes_that_fill_no_tile(n: int, k: int, group_size: int) -> None:
    torch.manual_seed(2)
    layer = Layer(random_weight(n, k, group_size, torch.bfloat16), torch.bfloat16)
    for m in (1, 9, 40, 130):
        layer.check(torch.randn(m, k, dtype=torch.bfloat16, device="cuda"), torch.randn(n, device="cuda").bfloat16())


@gpu
def test_large_activations_stay_finite() -> None:
    torch.manual_seed(3)
    weight = random_weight(64, 4096, -1, torch.float16)
    layer = Layer(dataclasses.replace(weight, scales=torch.full((64, 1), 1e-4), layer="large"), torch.float16)
    for m in (1, 20, 100):  # sums of codes times activations pass 65504 long before they are scaled
        layer.check(1000 * torch.randn(m, 4096, device="cuda").half())


@gpu
def test_integers_are_exact() -> None:
    torch.manual_seed(4)
    weight = random_weight(256, 512, -1, torch.bfloat16)
    layer = Layer(dataclasses.replace(weight, scales=torch.ones(256, 1), layer="exact"), torch.float16)
    for m in (3, 33, 200):
        x = torch.randint(-1, 2, (m, 512), device="cuda").half()
        assert torch.equal(layer.run(x).double(), x.double() @ layer.dense.T)


@gpu
def test_repeats_side_streams_and_graphs_are_bitwise_equal() -> None:
    torch.manual_seed(5)
    layer = Layer(random_weight(768, 2048, 128, torch.bfloat16), torch.bfloat16)
    for m in (1, 16, 50, 256):
        x = torch.randn(m, 2048, device="cuda").bfloat16()
        y = layer.run(x)
        assert all(torch.equal(layer.run(x), y) for _ in range(100))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = layer.run(x)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(beside, y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer.run(x)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, y)


@gpu
def test_dependent_launches_wait_for_their_input() -> None:
    torch.manual_seed(6)
    layer = Layer(random_weight(1024, 1024, 128, torch.bfloat16), torch.bfloat16)
    for m in (1, 16, 64, 128):
        x = torch.randn(m, 1024, device="cuda").bfloat16()
        apart = x
        for _ in range(8):
            apart = layer.run(apart)
            torch.cuda.synchronize()
        together = x
        for _ in range(8):
            together = layer.run(together)
        assert torch.equal(together, apart)


@gpu
def test_stages_come_round_while_the_next_kernel_waits() -> None:
    torch.manual_seed(8)
    layers = [Layer(random_weight(8192, 8192, 128, torch.bfloat16, seed), torch.bfloat16) for seed in range(3)]
    for m in (1, 8, 16, 32, 64):
        x = torch.randn(m, 8192, device="cuda").bfloat16()
        apart = []
        for layer in layers:
            layer.check(x)
            apart.append(layer.run(x))
            torch.cuda.synchronize()
        together = [layer.run(x) for _ in range(20) for layer in layers]
        assert all(torch.equal(y, apart[i % 3]) for i, y in enumerate(together))


@gpu
@pytest.mark.parametrize("n", [64, 192, 320, 2112, 6336, 8448, 12304, 14800, 19008, 33920])
def test_row_tiles_of_every_height(n: int) -> None:
    torch.manual_seed(9)
    layer = Layer(random_weight(n, 384, 128, torch.bfloat16), torch.bfloat16)
    for m in (1, 5, 8, 9, 16, 20, 64, 128, 200, 400, 1100):
        layer.check(torch.randn(m, 384, device="cuda").bfloat16())


@gpu
@pytest.mark.parametrize("n", [1056, 3168, 5280, 10560, 14784, 28672])
def test_uneven_row_tiles_while_stages_come_round(n: int) -> None:
    torch.manual_seed(10)
    layer = Layer(random_weight(n, 4096, 128, torch.bfloat16), torch.bfloat16)  # one, three, five, seven row blocks
    for m in (1, 8, 9, 16):
        x = torch.randn(m, 4096, device="cuda").bfloat16()
        layer.check(x)
        y = layer.run(x)
        assert all(torch.equal(layer.run(x), y) for _ in range(20))


@gpu
def test_strided_tokens_no_tokens_and_nan() -> None:
    torch.manual_seed(7)
    layer = Layer(random_weight(64, 160, 32, torch.bfloat16), torch.bfloat16)
    wide = torch.randn(20, 320, device="cuda").bfloat16()
    layer.check(wide[:, 160:])
    layer.check(wide.flatten()[4 : 4 + 5 * 160].view(5, 160))  # not 16-byte aligned
    assert layer.run(wide[:0, :160]).shape == (0, 64)
    x = wide[:, :160].contiguous()
    x[3] = float("nan")
    y = layer.run(x)
    assert y[3].isnan().all() and not y[torch.arange(20, device="cuda") != 3].isnan().any()


@gpu
def test_packs_a_large_layer_on_the_gpu() -> None:
    weight = random_weight(4096, 4096, 128, torch.bfloat16)
    on_cpu = pack_panels(weight.values, weight.positions, weight.scales, 128)
    on_gpu = KERNEL.prepare(weight.spec(torch.bfloat16), weight.to(torch.device("cuda")))["weight_packed"]
    assert torch.equal(on_cpu, on_gpu.cpu())
