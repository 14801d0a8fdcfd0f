"""The CPU kernels against the hub's dense weight in float64, for every tier that this machine runs."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_sparse import native
from vllm_sparse.errors import OptionError
from vllm_sparse.kernels import choose_kernel, cpu
from vllm_sparse.kernels.reference import ReferenceKernel, quantize_activations, quantize_asymmetric
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import LinearSpec, Sparse24Weight, pack_nibbles

pytestmark = pytest.mark.skipif(native.cpu is None, reason="the extension module vllm_sparse._cpu is not built")

TIERS = native.cpu.tiers() if native.cpu else []
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rounding of the result alone: half a unit in the last place, and for float32 the rounding of a few hundred additions.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2e-6}
PAIRS = torch.tensor([4, 8, 12, 9, 13, 14], dtype=torch.uint8)
CASES = (
    ("bf16", torch.bfloat16, -1),
    ("bf16", torch.float16, -1),
    ("fp8", torch.float8_e4m3fn, -1),
    ("int8", torch.int8, -1),
    ("w8a16", torch.int8, -1),
    ("w8a16", torch.int8, 64),
    ("w4a16", torch.int8, -1),
    ("w4a16", torch.int8, 32),
    ("w4a16", torch.int8, 64),
    ("w4a16", torch.int8, 128),
)


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    native.tier.cache_clear()
    yield request.param
    native.tier.cache_clear()


def random_values(dtype: torch.dtype, shape: tuple[int, int], low: int, high: int) -> Tensor:
    if dtype == torch.float8_e4m3fn:  # every byte but the two NaNs: zeros of both signs, subnormals, largest values
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        return torch.where((codes & 0x7F) == 0x7F, codes & 0x80, codes).view(dtype)
    if dtype == torch.int8:
        return torch.randint(low, high + 1, shape, dtype=torch.int8)
    values = torch.randn(shape).to(dtype)
    values[torch.rand(shape) < 0.1] = 0.0
    values[torch.rand(shape) < 0.1] = -0.0
    return values


def random_weight(
    scheme: str,
    n: int,
    k: int,
    values: torch.dtype,
    group_size: int = -1,
    scales: torch.dtype = torch.float32,
    static: bool = False,
    symmetric: bool = True,
) -> Sparse24Weight:
    kind = get_scheme(scheme)
    low, high = (-8, 7) if kind.weight_bits == 4 else (-128, 127)
    groups = 1 if group_size == -1 else k // group_size
    return Sparse24Weight(
        kind,
        random_values(values, (n, k // 2), low, high),
        pack_nibbles(PAIRS[torch.randint(0, 6, (n, k // 4))]).contiguous(),
        (torch.rand(n, groups) + 0.5).to(scales) if kind.scaled else None,
        group_size,
        torch.tensor([0.011]) if static else None,
        symmetric_input=symmetric,
        input_zero=torch.tensor([-37], dtype=torch.int32) if static and not symmetric else None,
    )


def expected(weight: Sparse24Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    operand = x.double()
    if not weight.symmetric_input:
        codes, scale, zero = quantize_asymmetric(x, weight.input_scale, weight.input_zero)
        operand = (codes.double() - zero) * scale.double()
    elif weight.scheme.activation is not None:
        codes, scale = quantize_activations(x, weight.scheme.activation, weight.input_scale)
        operand = codes.double() * scale.double()
    y = operand @ weight.to_dense(torch.float64).T
    return y if bias is None else y + bias.double()


def run(weight: Sparse24Weight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel, spec = cpu.CpuKernel(), weight.spec(x.dtype)
    assert kernel.reason_against(spec, x.device) is None
    return kernel.apply(spec, kernel.prepare(spec, weight), x, None, bias)


def check(weight: Sparse24Weight, x: Tensor, bias: Tensor | None = None) -> None:
    y, want = run(weight, x, bias), expected(weight, x, bias)
    assert y.shape == want.shape and y.dtype == x.dtype
    assert (y.double() - want).norm() <= TOLERANCE[x.dtype] * want.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scheme", "values", "group_size"), CASES)
def test_matches_float64(tier: str, scheme: str, values: torch.dtype, group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for m in (1, 2, 3, 7, 16, 17, 40):
        weight = random_weight(scheme, 40, 1152, values, group_size, DTYPES[m % 3])
        check(weight, torch.randn(m, 1152).to(dtype), torch.randn(40).to(dtype) if m % 2 else None)


@pytest.mark.parametrize(("scheme", "values"), [case[:2] for case in CASES if case[2] == -1])
def test_any_n_and_any_k_that_is_a_multiple_of_4(tier: str, scheme: str, values: torch.dtype) -> None:
    torch.manual_seed(1)
    for n in (1, 15, 16, 17, 33):
        for k in (4, 28, 32, 36, 100):
            check(random_weight(scheme, n, k, values), torch.randn(3, k))


@pytest.mark.parametrize("scheme", ["w4a16", "int8", "bf16"])
def test_every_number_of_tokens(tier: str, scheme: str) -> None:
    torch.manual_seed(2)
    values = torch.bfloat16 if scheme == "bf16" else torch.int8
    weight = random_weight(scheme, 24, 544 if scheme != "w4a16" else 640, values, 128 if scheme == "w4a16" else -1)
    x = torch.randn(300, weight.k).bfloat16()
    want = expected(weight, x, None)
    kernel, spec = cpu.CpuKernel(), weight.spec(x.dtype)
    packed = kernel.prepare(spec, weight)
    for m in range(301):
        y = kernel.apply(spec, packed, x[:m], None, None)
        assert (y.double() - want[:m]).norm() <= TOLERANCE[x.dtype] * want[:m].norm()


def test_more_tokens_than_one_pass(tier: str) -> None:
    torch.manual_seed(3)
    check(random_weight("int8", 16, 64, torch.int8), torch.randn(1100, 64).bfloat16(), torch.randn(16).bfloat16())


@pytest.mark.parametrize("m", [1, 4, 16, 50])
def test_int8_integers_are_exact(tier: str, m: int) -> None:
    torch.manual_seed(4)
    weight = random_weight("int8", 48, 4096, torch.int8)
    weight = Sparse24Weight(weight.scheme, weight.values, weight.positions, torch.ones(48, 1), -1, torch.ones(1))
    x = torch.randint(-127, 128, (m, 4096)).float()
    want = x.long() @ weight.to_dense_codes().long().T
    assert int(want.abs().max()) < 2**24  # float32 results hold the sums
    assert torch.equal(run(weight, x).long(), want)


@pytest.mark.parametrize("m", [1, 5, 50])
def test_int8_extremes_do_not_saturate(tier: str, m: int) -> None:
    k = 1024
    for code in (-128, 127):
        values = torch.full((16, k // 2), code, dtype=torch.int8)
        positions = torch.full((16, k // 8), 0x44, dtype=torch.uint8)
        weight = Sparse24Weight(get_scheme("int8"), values, positions, torch.ones(16, 1), -1, torch.ones(1))
        for level in (-1000.0, 1000.0):
            x = torch.full((m, k), level)
            assert torch.equal(run(weight, x), torch.full((m, 16), float(code * k // 2 * (127 if level > 0 else -127))))


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_activations_are_the_references(tier: str, scheme: str, dtype: torch.dtype) -> None:
    """A weight that is the identity on even columns shows the activation codes themselves."""
    torch.manual_seed(5)
    k = 256
    identity = torch.zeros(k // 4, k)
    identity[torch.arange(k // 4), torch.arange(k // 4) * 4 + torch.arange(k // 4) % 4] = 1
    kind = get_scheme(scheme)
    for static in (None, torch.tensor([0.03125])):
        dense = identity.to(kind.value_dtypes[0])
        weight = Sparse24Weight.from_dense(dense, kind, torch.ones(k // 4, 1), input_scale=static)
        x = torch.cat(
            (torch.randn(9, k), torch.randn(9, k) * 10.0 ** torch.randint(-6, 4, (9, k)), torch.zeros(1, k))
        ).to(dtype)
        codes, scale = quantize_activations(x, kind.activation, static)
        want = (codes.float() * scale) @ identity.T
        torch.testing.assert_close(
            run(weight, x), want.to(dtype), rtol=1e-6 if dtype == torch.float32 else 2.0**-7, atol=0
        )


def test_static_activations(tier: str) -> None:
    torch.manual_seed(6)
    for scheme, values in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        check(random_weight(scheme, 32, 160, values, static=True), torch.randn(6, 160) * 3)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_with_a_zero_point(tier: str, dtype: torch.dtype, static: bool) -> None:
    """Tokens of both signs, all above and all below zero, all zero; weights reach -128, and so do codes."""
    torch.manual_seed(11)
    for m, n, k in ((1, 40, 1152), (5, 16, 100), (16, 33, 384), (40, 48, 2176)):
        weight = random_weight("int8", n, k, torch.int8, static=static, symmetric=False)
        x = torch.randn(m, k) + torch.tensor([0.0, 3.0, -3.0, 0.3])[torch.arange(m) % 4, None]
        x[4:5] = 0
        bias = torch.randn(n).to(dtype)
        check(weight, x.to(dtype), bias)
        spec, operand = weight.spec(dtype), x.to(dtype)
        reference = ReferenceKernel()
        y = reference.apply(spec, reference.prepare(spec, weight), operand, None, bias)
        want = expected(weight, operand, bias)
        assert (y.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_codes_with_a_zero_point_are_the_references(tier: str) -> None:
    torch.manual_seed(12)
    k = 256
    identity = torch.zeros(k // 4, k)
    identity[torch.arange(k // 4), torch.arange(k // 4) * 4 + torch.arange(k // 4) % 4] = 1
    kind, scales = get_scheme("int8"), torch.ones(k // 4, 1)
    x = torch.cat((torch.randn(9, k), torch.rand(9, k) + 2, torch.zeros(1, k)))
    for static, zero in ((None, None), (torch.tensor([0.03125]), torch.tensor([100], dtype=torch.int32))):
        weight = Sparse24Weight.from_dense(identity.to(torch.int8), kind, scales, input_scale=static)
        weight = dataclasses.replace(weight, symmetric_input=False, input_zero=zero, layer="identity")
        codes, scale, zeros = quantize_asymmetric(x, static, zero)
        torch.testing.assert_close(run(weight, x), ((codes - zeros) * scale) @ identity.T, rtol=1e-6, atol=0)


def test_all_zero_patterns(tier: str) -> None:
    """The eleven sets of at most two non-zeros in a group of four, -0.0 among the zeros."""
    groups = [[float(i in kept) for i in range(4)] for kept in ((), (0,), (1,), (2,), (3,))]
    groups += [[float(i in (a, b)) for i in range(4)] for a in range(4) for b in range(a + 1, 4)]
    dense = torch.tensor(groups).flatten().repeat(2, 1)
    dense[1] = torch.where(dense[1] == 0, -0.0, dense[1])
    weight = Sparse24Weight.from_dense(dense.bfloat16(), get_scheme("bf16"))
    x = torch.arange(1.0, 45.0).repeat(2, 1)
    assert torch.equal(run(weight, x), x @ dense.T)


def test_strided_rows_and_columns(tier: str) -> None:
    torch.manual_seed(7)
    weight = random_weight("w4a16", 16, 64, torch.int8)
    wide = torch.randn(5, 200)
    check(weight, wide[:, 8:72])
    check(weight, torch.randn(64, 5).T)


def test_no_tokens_and_no_channels(tier: str) -> None:
    weight = random_weight("fp8", 16, 64, torch.float8_e4m3fn)
    assert run(weight, torch.randn(0, 64)).shape == (0, 16)
    assert run(random_weight("int8", 0, 64, torch.int8), torch.randn(3, 64)).shape == (3, 0)


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int8", "w4a16"])
def test_repeated_calls_are_bitwise_equal(tier: str, scheme: str) -> None:
    torch.manual_seed(8)
    weight = random_weight(scheme, 80, 512, get_scheme(scheme).value_dtypes[0])
    for m in (1, 16, 30):
        x = torch.randn(m, 512).bfloat16()
        first = run(weight, x)
        assert all(torch.equal(run(weight, x), first) for _ in range(10))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_thread_counts(tier: str, threads: int) -> None:
    torch.manual_seed(9)
    before = torch.get_num_threads()
    weights = [random_weight(scheme, 72, 384, values, group_size) for scheme, values, group_size in CASES]
    inputs = [torch.randn(m, 384).bfloat16() for m in (1, 6, 40)]
    want = [[run(weight, x) for x in inputs] for weight in weights]
    try:
        torch.set_num_threads(threads)
        got = [[run(weight, x) for x in inputs] for weight in weights]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for row, wanted in zip(got, want, strict=True) for a, b in zip(row, wanted, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_w4a8_is_w4a16_with_int8_activations(tier: str, group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(10)
    kernel = cpu.CpuW4A8Kernel()
    for m, n, k in ((1, 40, 1152), (2, 16, 128), (16, 33, 384), (20, 48, 2176)):
        weight = random_weight("w4a16", n, k, torch.int8, group_size, DTYPES[m % 3])
        spec, x, bias = weight.spec(dtype), torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        codes, scale = quantize_activations(x, torch.int8, None)
        want = (codes.double() * scale.double()) @ weight.to_dense(torch.float64).T + bias.double()
        y = kernel.apply(spec, kernel.prepare(spec, weight), x, None, bias)
        # Unsigned codes add 128 times the weights' sums and take them away again: float32 loses a little of the result.
        assert (y.double() - want).norm() <= max(TOLERANCE[dtype], 4e-6) * want.norm()


def test_w4a8_runs_only_when_asked_for() -> None:
    spec = LinearSpec(get_scheme("w4a16"), 16, 64, 32, torch.bfloat16, torch.bfloat16)
    assert choose_kernel(spec, torch.device("cpu")).name == "cpu"
    assert choose_kernel(spec, torch.device("cpu"), only="cpu_w4a8").name == "cpu_w4a8"


def test_w4a8_is_for_w4a16_alone() -> None:
    spec = LinearSpec(get_scheme("fp8"), 16, 64, -1, torch.bfloat16, torch.float32)
    reason = cpu.CpuW4A8Kernel().reason_against(spec, torch.device("cpu"))
    assert reason == "quantizes the activations of scheme w4a16, not of fp8"


def test_packed_tensors_follow_from_the_spec() -> None:
    kernel = cpu.CpuKernel()
    for scheme, values, group_size in CASES:
        first, second = (random_weight(scheme, 40, 384, values, group_size) for _ in range(2))
        shapes = [
            {name: t.shape for name, t in kernel.prepare(w.spec(torch.bfloat16), w).items()} for w in (first, second)
        ]
        assert shapes[0] == shapes[1]


def test_packed_size_is_what_the_format_promises() -> None:
    """4 bits of positions per group and the kept values: 9, 5 and 3 bits per original weight, without scales."""
    bits = {"bf16": 9, "fp8": 5, "int8": 5, "w8a16": 5, "w4a16": 3}
    for scheme, want in bits.items():
        weight = random_weight(scheme, 64, 256, get_scheme(scheme).value_dtypes[0])
        panels = cpu.CpuKernel().prepare(weight.spec(torch.bfloat16), weight)["panels"]
        assert panels.numel() * panels.element_size() * 8 == want * 64 * 256


def test_op_is_registered_correctly() -> None:
    weight = random_weight("w4a16", 16, 64, torch.int8, 32)
    spec = weight.spec(torch.bfloat16)
    packed = cpu.CpuKernel().prepare(spec, weight)
    arguments = (
        torch.randn(3, 64).bfloat16(),
        packed["panels"],
        packed["group_scales"],
        None,
        None,
        None,
        None,
        None,
        "w4a16",
        16,
        32,
        True,
    )
    torch.library.opcheck(torch.ops.vllm_sparse.cpu_linear.default, arguments)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_there_is_one_openmp_runtime() -> None:
    """In a process of its own, where no other test's libraries are loaded."""
    program = "import vllm_sparse.kernels.cpu; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    files = {line.split()[-1] for line in maps.splitlines() if ".so" in line}
    assert any("_cpu." in name for name in files)
    assert len([name for name in files if re.search(r"lib(g|i)omp", name)]) == 1


def test_reasons_against() -> None:
    kernel = cpu.CpuKernel()
    spec = LinearSpec(get_scheme("int8"), 16, 64, -1, torch.bfloat16, torch.float32)
    assert kernel.reason_against(spec, torch.device("cuda")) == "runs on the CPU, not on cuda"
    double = LinearSpec(get_scheme("int8"), 16, 64, -1, torch.float64, torch.float32)
    assert "takes float32, bfloat16 and float16" in str(kernel.reason_against(double, torch.device("cpu")))
    wide = LinearSpec(get_scheme("int8"), 16, 1 << 20, -1, torch.bfloat16, torch.float32)
    assert "exact up to 131586 input features" in str(kernel.reason_against(wide, torch.device("cpu")))


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "mmx")
    native.tier.cache_clear()
    with pytest.raises(
        OptionError, match=r"VLLM_SPARSE_CPU_ISA: no CPU kernels named 'mmx' run on this machine; it has .*scalar"
    ):
        native.tier()
    native.tier.cache_clear()
