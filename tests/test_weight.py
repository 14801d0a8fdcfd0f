"""The hub: dense to 2:4 and back in every dtype and zero pattern, and what it refuses."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.weights import random_codes, random_weight, same_bits
from vllm_sparse.errors import FormatError, NotSparseError
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight, count_violations, nonzero_mask, pack_nibbles, unpack_nibbles

PATTERNS = [frozenset(kept) for size in range(3) for kept in combinations(range(4), size)]
DTYPES = [(scheme, dtype) for scheme in SCHEMES.values() for dtype in scheme.value_dtypes]
IDS = [f"{scheme.name}-{dtype}".replace("torch.", "") for scheme, dtype in DTYPES]


def scales_for(scheme, n):
    return torch.ones(n, 1) if scheme.scaled else None


def make(**changed):
    """Return a small int8 weight, some of its fields replaced."""
    fields = {
        "scheme": SCHEMES["int8"],
        "values": torch.ones(2, 6, dtype=torch.int8),
        "positions": torch.full((2, 2), 0x44, dtype=torch.uint8),
        "scales": torch.ones(2, 1),
        "layer": "model.q_proj",
    }
    return Sparse24Weight(**(fields | changed))


@pytest.mark.parametrize(("scheme", "dtype"), DTYPES, ids=IDS)
def test_all_eleven_zero_patterns_survive(scheme, dtype):
    assert len(PATTERNS) == 11
    dense = torch.zeros(11, 4, dtype=torch.float32)
    for row, kept in enumerate(PATTERNS):
        for place in kept:
            dense[row, place] = -(place + 1)
    dense = dense.to(dtype)
    weight = Sparse24Weight.from_dense(dense, scheme, scales_for(scheme, 11))
    weight.validate("layer")
    assert same_bits(weight.to_dense_codes(), dense)
    nibbles = weight.nibbles().flatten().tolist()
    for kept, nibble in zip(PATTERNS, nibbles, strict=True):
        assert kept <= {nibble & 3, nibble >> 2}, "a non-zero was dropped"
    assert set(nibbles) == {4, 8, 12, 9, 13, 14}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_negative_zero_is_zero(dtype):
    dense = torch.tensor([[-0.0, 1.0, -0.0, 2.0], [-0.0, -0.0, -0.0, -0.0]]).to(dtype)
    assert nonzero_mask(dense).tolist() == [[False, True, False, True], [False] * 4]
    assert count_violations(dense) == 0
    scheme = SCHEMES["fp8" if dtype == torch.float8_e4m3fn else "bf16"]
    weight = Sparse24Weight.from_dense(dense, scheme, scales_for(scheme, 2))
    assert weight.to_dense().tolist() == [[0.0, 1.0, 0.0, 2.0], [0.0] * 4]


@given(st.integers(0, 5), st.integers(1, 12), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_dense_to_sparse_and_back_is_exact(n, groups, kind, seed):
    scheme, dtype = kind
    k = 4 * groups
    dense = random_codes(n, k, scheme, dtype, torch.Generator().manual_seed(seed))
    weight = Sparse24Weight.from_dense(dense, scheme, scales_for(scheme, n))
    weight.validate("layer")
    assert (weight.n, weight.k) == (n, k)
    assert weight.positions.shape == (n, (k + 7) // 8)
    back = weight.to_dense_codes()
    assert back.dtype == dtype
    assert torch.equal(back.float(), dense.float())  # -0.0 may become 0.0, nothing else may change
    again = Sparse24Weight.from_dense(back, scheme, scales_for(scheme, n))
    assert same_bits(again.positions, weight.positions), "compression has to be a function of the dense weight"


@given(st.integers(0, 4), st.integers(0, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_nibbles_pack_and_unpack(n, groups, data):
    values = data.draw(st.lists(st.integers(0, 15), min_size=n * groups, max_size=n * groups))
    nibbles = torch.tensor(values, dtype=torch.uint8).reshape(n, groups)
    packed = pack_nibbles(nibbles)
    assert packed.shape == (n, (groups + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, groups), nibbles)
    if groups % 2 and n:
        assert (packed[:, -1] >> 4).tolist() == [4] * n


def test_many_rows_are_compressed_in_blocks(monkeypatch):
    dense = random_codes(37, 24, SCHEMES["bf16"], torch.bfloat16, torch.Generator().manual_seed(1))
    whole = Sparse24Weight.from_dense(dense, SCHEMES["bf16"])
    monkeypatch.setattr("vllm_sparse.weight._ROWS_AT_ONCE", 100)
    blocks = Sparse24Weight.from_dense(dense, SCHEMES["bf16"])
    assert same_bits(whole.values, blocks.values)
    assert same_bits(whole.positions, blocks.positions)
    assert same_bits(blocks.to_dense_codes(), whole.to_dense_codes())
    blocks.validate("layer")
    broken = blocks.positions.clone()
    broken[36, 2] = 0
    with pytest.raises(FormatError, match="out of order"):
        Sparse24Weight(SCHEMES["bf16"], blocks.values, broken).validate("layer")


@pytest.mark.parametrize("n", [0, 3])
def test_dequantized_is_code_times_scale(n):
    scheme = SCHEMES["w4a16"]
    weight = random_weight(scheme, n, 64, group_size=32, scale_dtype=torch.float16)
    dense = weight.to_dense(torch.float64)
    codes = weight.to_dense_codes().double().reshape(n, 2, 32)
    assert torch.equal(dense, (codes * weight.scales.double().reshape(n, 2, 1)).reshape(n, 64))
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(weight.matmul(x), x @ dense.T)


def test_three_nonzeros_in_a_group_are_counted_and_named():
    dense = torch.zeros(3, 8, dtype=torch.bfloat16)
    dense[0, :3] = 1
    dense[2, 4:] = 1
    assert count_violations(dense) == 2
    message = r"model\.q_proj: 2 of 6 groups of four have more than two non-zeros, so the weight is not 2:4"
    with pytest.raises(NotSparseError, match=message):
        Sparse24Weight.from_dense(dense, SCHEMES["bf16"], layer="model.q_proj")


def test_nan_is_not_zero():
    dense = torch.full((1, 4), float("nan"), dtype=torch.float8_e4m3fn)
    assert count_violations(dense) == 1


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (torch.zeros(2, 6, dtype=torch.bfloat16), "q: 2:4 needs a multiple of 4 input features, got 6"),
        (torch.zeros(8, dtype=torch.bfloat16), r"q: expected a matrix \[n, k\], got shape \[8\]"),
        (torch.zeros(2, 8, dtype=torch.float32), "q: scheme bf16 cannot hold values of torch.float32"),
    ],
)
def test_what_cannot_be_compressed_is_an_error(dense, message):
    with pytest.raises(FormatError, match=message):
        Sparse24Weight.from_dense(dense, SCHEMES["bf16"], layer="q")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": torch.ones(2, 5, dtype=torch.int8)}, r"expected values \[n, k/2\] with k a multiple of 4"),
        ({"values": torch.ones(12, dtype=torch.int8)}, r"expected values \[n, k/2\]"),
        ({"values": torch.ones(2, 6)}, "scheme int8 cannot hold values of torch.float32"),
        ({"positions": torch.zeros(2, 3, dtype=torch.uint8)}, r"expected positions torch.uint8 \[2, 2\]"),
        ({"positions": torch.zeros(2, 2, dtype=torch.int8)}, r"expected positions torch.uint8 \[2, 2\]"),
        ({"scales": None}, "scheme int8 needs weight scales"),
        ({"scales": torch.ones(2)}, r"expected floating-point weight scales \[2, 1\]"),
        ({"scales": torch.ones(2, 1, dtype=torch.int32)}, r"expected floating-point weight scales \[2, 1\]"),
        ({"input_scale": torch.ones(2)}, r"expected an input scale torch.float32 \[1\], got torch.float32 \[2\]"),
        ({"input_scale": torch.ones(1).half()}, r"expected an input scale torch.float32 \[1\], got torch.float16"),
    ],
)
def test_wrong_shapes_and_dtypes_name_the_layer(changed, message):
    with pytest.raises(FormatError, match=f"model.q_proj: {message}"):
        make(**changed)


def test_schemes_without_scales_refuse_them():
    with pytest.raises(FormatError, match=r"model.q_proj: scheme bf16 has no weight scales"):
        make(scheme=SCHEMES["bf16"], values=torch.ones(2, 6, dtype=torch.bfloat16))
    with pytest.raises(FormatError, match=r"model.q_proj: scheme w8a16 has no input scale"):
        make(scheme=SCHEMES["w8a16"], input_scale=torch.ones(1))


def test_zero_points_are_of_static_int8_activations_alone():
    zero, scale = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    static = make(symmetric_input=False, input_scale=scale, input_zero=zero).spec(torch.bfloat16)
    assert static.static_input and not static.symmetric_input
    assert not make(symmetric_input=False).spec(torch.bfloat16).symmetric_input
    message = "model.q_proj: static activations that are not symmetric, and no others, have a zero point"
    for changed in (
        {"input_zero": zero, "input_scale": scale},
        {"symmetric_input": False, "input_zero": zero},
        {"symmetric_input": False, "input_scale": scale},
    ):
        with pytest.raises(FormatError, match=message):
            make(**changed)
    with pytest.raises(
        FormatError, match=r"model.q_proj: expected an input zero point torch.int32 \[1\], got torch.int8"
    ):
        make(symmetric_input=False, input_scale=scale, input_zero=zero.to(torch.int8))
    with pytest.raises(FormatError, match=r"model.q_proj: scheme w8a16 has no zero point of activations"):
        make(scheme=SCHEMES["w8a16"], symmetric_input=False)


@pytest.mark.parametrize("nibble", [n for n in range(16) if (n & 3) >= (n >> 2)])
def test_positions_out_of_order_or_repeated_are_refused(nibble):
    positions = torch.full((2, 2), 0x44, dtype=torch.uint8)
    positions[1, 0] = 0x40 | nibble
    with pytest.raises(FormatError, match="q: positions of a 2:4 group are out of order or repeated"):
        make(positions=positions).validate("q")


def test_the_unused_half_byte_is_fixed():
    positions = torch.full((2, 2), 0x44, dtype=torch.uint8)
    positions[0, 1] = 0xE4
    with pytest.raises(FormatError, match="q: the unused half of the last byte of positions is not 4"):
        make(positions=positions).validate("q")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(bad, dtype):
    values = torch.ones(2, 6, dtype=dtype)
    values[1, 3] = bad
    with pytest.raises(FormatError, match="q: the weight holds NaN or Inf"):
        make(scheme=SCHEMES["bf16"], values=values, scales=None).validate("q")


def test_fp8_nan_is_refused():
    values = torch.ones(2, 6, dtype=torch.float8_e4m3fn)
    values.view(torch.uint8)[0, 0] = 0xFF
    with pytest.raises(FormatError, match="q: the weight holds NaN or Inf"):
        make(scheme=SCHEMES["fp8"], values=values).validate("q")


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_not_positive_are_refused(bad):
    scales = torch.ones(2, 1)
    scales[1] = bad
    with pytest.raises(FormatError, match="q: a weight scale is zero, negative, NaN or Inf"):
        make(scales=scales).validate("q")
    with pytest.raises(FormatError, match="q: the input scale is zero, negative, NaN or Inf"):
        make(input_scale=torch.full((1,), bad)).validate("q")


@pytest.mark.parametrize("bad", [-9, 8])
def test_four_bit_codes_out_of_range_are_refused(bad):
    values = torch.ones(2, 6, dtype=torch.int8)
    values[0, 5] = bad
    with pytest.raises(FormatError, match="q: a 4-bit code is outside -8 … 7"):
        make(scheme=SCHEMES["w4a16"], values=values).validate("q")


def test_spec_says_what_a_kernel_needs():
    weight = random_weight(SCHEMES["w4a16"], 8, 128, group_size=64, scale_dtype=torch.bfloat16)
    spec = weight.spec(torch.float16)
    assert (spec.scheme.name, spec.n, spec.k, spec.group_size) == ("w4a16", 8, 128, 64)
    assert (spec.dtype, spec.scale_dtype, spec.static_input) == (torch.float16, torch.bfloat16, False)
    static = random_weight(SCHEMES["fp8"], 8, 16, static_input=True)
    assert static.to("cpu").spec(torch.bfloat16).static_input
