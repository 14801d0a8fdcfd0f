"""The native format: bits as docs/formats.md has them, round trips, and configs and tensors that lie."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.weights import GROUPED, random_weight, same_weight
from vllm_sparse.errors import FormatError
from vllm_sparse.formats import detect
from vllm_sparse.formats.sparse24 import Sparse24Format, pack_int4, unpack_int4
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight

BASE = {"quant_method": "sparse24", "version": 1}


def test_the_bytes_are_those_of_the_specification():
    dense = torch.tensor([[1, 0, -8, 0, 0, 7, 0, -1, 0, 0, 2, 3]], dtype=torch.int8)
    weight = Sparse24Weight.from_dense(dense, SCHEMES["w4a16"], torch.ones(1, 1))
    tensors = Sparse24Format(SCHEMES["w4a16"]).from_weight(weight)
    assert tensors["weight_packed"].tolist() == [[0x81, 0xF7, 0x32]]
    # groups: positions 0, 2 -> 8; 1, 3 -> 13; 2, 3 -> 14; the unused half is 4
    assert tensors["weight_positions"].tolist() == [[0xD8, 0x4E]]


@st.composite
def formats(draw):
    scheme = SCHEMES[draw(st.sampled_from(list(SCHEMES)))]
    group_size = draw(st.sampled_from(GROUPED)) if scheme.grouped else -1
    static = scheme.activation is not None and draw(st.booleans())
    value_dtype = draw(st.sampled_from(["bfloat16", "float16"])) if not scheme.scaled else "bfloat16"
    scale_dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"])) if scheme.scaled else "float32"
    ignore = tuple(draw(st.lists(st.sampled_from(["lm_head", "re:.*gate$", "model.q_proj"]), max_size=3)))
    return Sparse24Format(scheme, value_dtype, group_size, scale_dtype, static, ignore)


@given(formats(), st.integers(0, 5), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_a_weight_survives_the_format_bit_by_bit(form, n, groups, seed):
    k = 4 * groups if form.group_size == -1 else form.group_size * groups
    dtype = getattr(torch, form.value_dtype) if not form.scheme.scaled else None
    scale_dtype = getattr(torch, form.scale_dtype)
    weight = random_weight(form.scheme, n, k, seed, dtype, scale_dtype, form.group_size, form.static_input)
    tensors = form.from_weight(weight)
    specs = form.tensors("q", n, k, torch.bfloat16)
    assert {s.name: (s.shape, s.dtype) for s in specs} == {x: (tuple(t.shape), t.dtype) for x, t in tensors.items()}
    assert form.features("q", {name: tuple(tensor.shape) for name, tensor in tensors.items()}) == (n, k)
    assert same_weight(form.to_weight("q", tensors, [n]), weight)
    assert Sparse24Format.from_config(form.to_config()) == form


@given(formats(), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_shards_are_cut_in_proportion(form, ways, blocks):
    n, k = 2 * ways, 8 * ways * blocks * (1 if form.group_size == -1 else form.group_size // 8)
    dtype = getattr(torch, form.value_dtype) if not form.scheme.scaled else None
    weight = random_weight(form.scheme, n, k, 5, dtype, getattr(torch, form.scale_dtype), form.group_size)
    form = Sparse24Format(form.scheme, form.value_dtype, form.group_size, form.scale_dtype)
    tensors, dense = form.from_weight(weight), weight.to_dense()
    for rank in range(ways):
        rows, columns = {}, {}
        for spec in form.tensors("q", n, k, torch.bfloat16):
            tensor = tensors[spec.name]
            rows[spec.name] = tensor.chunk(ways, spec.output_dim)[rank]
            columns[spec.name] = tensor if spec.input_dim is None else tensor.chunk(ways, spec.input_dim)[rank]
        assert torch.equal(form.to_weight("q", rows, [2]).to_dense(), dense.chunk(ways, 0)[rank])
        assert torch.equal(form.to_weight("q", columns, [n]).to_dense(), dense.chunk(ways, 1)[rank])


def test_fused_parts_take_the_largest_input_scale():
    form = Sparse24Format(SCHEMES["fp8"], static_input=True)
    tensors = form.from_weight(random_weight(SCHEMES["fp8"], 6, 8, static_input=True))
    tensors["input_scale"] = torch.tensor([0.5, 2.0, 1.0])
    assert form.to_weight("qkv", tensors, [2, 2, 2]).input_scale.tolist() == [2.0]


def test_activations_with_a_zero_point():
    config = BASE | {"scheme": "int8", "activation": "static", "symmetric_activation": False}
    form = Sparse24Format.from_config(config)
    assert form.to_config() == config | {"scale_dtype": "float32", "ignore": []}
    scale, zero = torch.tensor([0.5]), torch.tensor([-100], dtype=torch.int32)
    weight = random_weight(SCHEMES["int8"], 6, 8)
    weight = dataclasses.replace(weight, input_scale=scale, symmetric_input=False, input_zero=zero, layer="q")
    tensors = form.from_weight(weight)
    assert tensors["input_zero_point"].dtype == torch.int8
    again = form.to_weight("q", tensors)
    assert again.input_scale.tolist() == [0.5] and again.input_zero.tolist() == [-100]
    assert again.spec(torch.bfloat16) == weight.spec(torch.bfloat16) and not again.spec(torch.bfloat16).symmetric_input
    # Codes of q stand for -14 … 113.5, those of k for -64 … 63.5: together for -64 … 113.5.
    tensors |= {"input_scale": torch.tensor([0.5, 0.5]), "input_zero_point": torch.tensor([-100, 0], dtype=torch.int8)}
    fused = form.to_weight("qk", tensors, [2, 4])
    assert fused.input_scale.item() == pytest.approx(177.5 / 255)
    assert fused.input_zero.tolist() == [round(-128 + 64 * 255 / 177.5)]
    dynamic = Sparse24Format.from_config(BASE | {"scheme": "int8", "symmetric_activation": False})
    assert dynamic.to_weight("q", dynamic.from_weight(weight)).spec(torch.bfloat16).symmetric_input is False


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=24).filter(lambda codes: len(codes) % 2 == 0))
def test_int4_codes_pack_and_unpack(codes):
    tensor = torch.tensor([codes], dtype=torch.int8)
    packed = pack_int4(tensor)
    assert packed.shape == (1, len(codes) // 2)
    assert torch.equal(unpack_int4(packed), tensor)


def test_the_format_is_detected():
    assert isinstance(detect(BASE | {"scheme": "fp8"}), Sparse24Format)
    assert Sparse24Format.claims(BASE)


def test_ignored_layers_are_left_to_others():
    form = Sparse24Format.from_config(BASE | {"scheme": "int8", "ignore": ["lm_head", "re:.*mlp"]})
    assert form.scheme_of("lm_head") is None
    assert form.scheme_of("model.layers.0.mlp.up_proj") is None
    assert form.scheme_of("model.layers.0.lm_head") is SCHEMES["int8"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": 2, "scheme": "fp8"}, "format version 2 is not 1; update vllm-sparse"),
        ({"version": None, "scheme": "fp8"}, "format version None is not 1"),
        ({"scheme": "fp8", "zero_points": True}, "unknown key 'zero_points' in a version 1 sparse24 config"),
        (
            {"scheme": "fp8", "symmetric_activation": False},
            "of scheme fp8: symmetric_activation False is not one of True",
        ),
        ({}, "scheme None is not one of bf16, fp8, int8, w4a16, w8a16"),
        ({"scheme": ["fp8"]}, r"scheme \['fp8'\] is not one of"),
        ({"scheme": "w4a16", "group_size": 16}, "of scheme w4a16: group_size 16 is not one of -1, 32, 64, 128"),
        ({"scheme": "w4a16", "group_size": 32.0}, "group_size 32.0 is not one of"),
        ({"scheme": "fp8", "group_size": 128}, "of scheme fp8: group_size 128 is not one of -1"),
        ({"scheme": "fp8", "scale_dtype": "float64"}, "scale_dtype 'float64' is not one of float32"),
        ({"scheme": "fp8", "scale_dtype": {}}, "scale_dtype {} is not one of float32"),
        ({"scheme": "bf16", "value_dtype": "float32"}, "value_dtype 'float32' is not one of bfloat16, float16"),
        ({"scheme": "w4a16", "activation": "static"}, "activation 'static' is not one of dynamic"),
        ({"scheme": "fp8", "ignore": "lm_head"}, "ignore must be a list of module names"),
        ({"scheme": "fp8", "ignore": [3]}, "ignore must be a list of module names"),
        ({"scheme": "fp8", "ignore": ["re:("]}, r"ignore has a bad pattern 're:\('"),
    ],
)
def test_a_config_that_is_wrong_is_an_error(config, message):
    with pytest.raises(FormatError, match=f"quantization_config.*{message}"):
        Sparse24Format.from_config(BASE | config)


def changed(name, tensor):
    form = Sparse24Format(SCHEMES["w4a16"], group_size=32, static_input=False)
    tensors = form.from_weight(random_weight(SCHEMES["w4a16"], 4, 64, group_size=32))
    return form, tensors | {name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight_packed", torch.zeros(4, 16), "expected weight_packed to be torch.uint8"),
        (
            "weight_packed",
            torch.zeros(64, dtype=torch.uint8),
            r"expected weight_packed to be a matrix, got shape \[64\]",
        ),
        ("weight_packed", torch.zeros(16, 4, dtype=torch.uint8), "group size 32 does not divide the 16 input"),
        ("weight_packed", torch.zeros(4, 0, dtype=torch.uint8), "2:4 needs a multiple of 4 input features, got 0"),
        ("weight_positions", torch.zeros(4, 7, dtype=torch.uint8), r"expected weight_positions to be .* \[4, 8\], got"),
        ("weight_positions", torch.zeros(4, 8, dtype=torch.uint8), "out of order or repeated"),
        ("weight_scale", torch.ones(4, 1), r"expected weight_scale to be torch.float32 \[4, 2\], got"),
        ("weight_scale", torch.ones(4, 2).half(), "expected weight_scale to be torch.float32"),
        ("weight_scale", torch.zeros(4, 2), "a weight scale is zero, negative, NaN or Inf"),
    ],
)
def test_tensors_that_are_wrong_are_errors_that_name_the_layer(name, tensor, message):
    form, tensors = changed(name, tensor)
    n = tensors["weight_packed"].shape[0]
    with pytest.raises(FormatError, match=f"model.q_proj: .*{message}"):
        form.to_weight("model.q_proj", tensors, [n])


def test_missing_tensors_are_named():
    form, tensors = changed("weight_packed", torch.zeros(4, 16, dtype=torch.uint8))
    del tensors["weight_scale"]
    with pytest.raises(FormatError, match=r"model.q_proj: tensor weight_scale is missing"):
        form.to_weight("model.q_proj", tensors, [4])
    with pytest.raises(FormatError, match=r"model.q_proj: the layer has none of the tensors of format sparse24"):
        form.to_weight("model.q_proj", {}, [4])
    form, tensors = changed("weight_scale", torch.ones(4, 2))
    with pytest.raises(FormatError, match=r"model.q_proj: the tensors have 4 output features, the model 8"):
        form.to_weight("model.q_proj", tensors, [4, 4])
