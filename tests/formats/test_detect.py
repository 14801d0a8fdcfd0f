"""The table of formats: what a config is recognised as, whether it needs a flag, and which layers it leaves alone."""

import pytest
import torch

from tests.formats.golden import CASES, config, layer
from vllm_sparse.errors import FormatError, NotSparseError
from vllm_sparse.formats import FORMATS, claims, detect, kind_of

CONFIGS = {case.name: config(case) for case in CASES}
WEIGHTS_8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
INPUTS_8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
GPTQ = {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": 4, "group_size": 128}
DENSE = {"format": "dense", "sparsity_structure": "unstructured", "targets": ["Linear"]}
SPARSE_ONLY = {"quant_method": "compressed-tensors", "sparsity_config": DENSE | {"sparsity_structure": "2:4"}}


def compressed(stored_as="float-quantized", weights=None, inputs=None, sparsity=None, **more):
    """Return a compressed-tensors config of one group."""
    group = {"targets": ["Linear"], "weights": weights or WEIGHTS_8, "input_activations": inputs}
    made = {"quant_method": "compressed-tensors", "format": stored_as, "config_groups": {"group_0": group | more}}
    return made | ({"sparsity_config": sparsity} if sparsity else {})


@pytest.mark.parametrize(
    ("found", "name", "claimed"),
    [
        ({"quant_method": "sparse24", "version": 1, "scheme": "fp8"}, "sparse24", True),
        (CONFIGS["bitmask-bf16"], "sparse-24-bitmask", True),
        (CONFIGS["bitmask-fp8"], "sparse-24-bitmask", True),
        (CONFIGS["legacy-bf16"], "sparse-bitmask", True),
        (CONFIGS["marlin-4bit-channel"], "marlin-24", True),
        (GPTQ, "gptq_marlin_24", True),
        ({"quant_method": "gptq_marlin_24", "bits": 4, "group_size": -1}, "gptq_marlin_24", True),
        (CONFIGS["packed-4bit-g32"], "pack-quantized", False),
        (CONFIGS["quantized-fp8-channel"], "quantized", False),
        (CONFIGS["quantized-int8-tensor"], "quantized", False),
        (compressed(inputs=INPUTS_8, sparsity=DENSE | {"sparsity_structure": "2:4"}), "quantized", True),
        (compressed(inputs=INPUTS_8, sparsity=DENSE), "pass-through", True),
        (compressed(inputs=INPUTS_8, sparsity=DENSE | {"targets": []}), "quantized", False),
        (compressed("pack-quantized", sparsity=DENSE), "pass-through", True),
        (compressed("mixed-precision"), "mixed-precision", False),
        ({}, "dense", False),
        (SPARSE_ONLY, "dense", True),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, None, False),
        ({"quant_method": "fp8"}, None, False),
        ({"quant_method": "awq", "bits": 4}, None, False),
        (compressed("nvfp4-pack-quantized"), None, False),
    ],
)
def test_a_config_is_recognised(found, name, claimed):
    kind = kind_of(found)
    assert (kind and kind.name) == name
    assert claims(found) is claimed
    if kind is not None:
        assert detect(found).name == name


def test_every_format_has_a_name_of_its_own():
    assert len({kind.name for kind in FORMATS}) == len(FORMATS)


ODD = [None, 3, "x", [], {}, [[]], {"a": []}, True, float("nan"), -1]


@pytest.mark.parametrize("value", ODD, ids=map(str, ODD))
@pytest.mark.parametrize(
    "key", ["quant_method", "format", "sparsity_config", "config_groups", "checkpoint_format", "is_marlin_24_format"]
)
def test_recognising_never_raises(key, value):
    for base in ({}, CONFIGS["bitmask-fp8"], CONFIGS["packed-4bit-g32"], {"quant_method": "gptq"}):
        found = {**base, key: value}
        claims(found)
        for kind in FORMATS:
            kind.matches(found)


@pytest.mark.parametrize(
    ("weights", "inputs", "scheme"),
    [
        (WEIGHTS_8, INPUTS_8, "fp8"),
        (WEIGHTS_8, INPUTS_8 | {"dynamic": False, "strategy": "tensor"}, "fp8"),
        (WEIGHTS_8 | {"strategy": "tensor"}, INPUTS_8, "fp8"),
        (WEIGHTS_8, None, None),  # weight-only FP8: vLLM's own
        (WEIGHTS_8 | {"strategy": "block"}, INPUTS_8, None),
        (WEIGHTS_8 | {"strategy": "group", "group_size": 128}, INPUTS_8, None),
        (WEIGHTS_8 | {"type": "int"}, INPUTS_8 | {"type": "int"}, "int8"),
        (WEIGHTS_8 | {"type": "int"}, INPUTS_8 | {"type": "int", "symmetric": False}, "int8"),
        (WEIGHTS_8, INPUTS_8 | {"symmetric": False}, None),
        (WEIGHTS_8 | {"type": "int"}, None, "w8a16"),
        (WEIGHTS_8 | {"type": "int", "symmetric": False}, None, None),
        (WEIGHTS_8 | {"type": "int"}, INPUTS_8, None),
        (WEIGHTS_8 | {"type": []}, INPUTS_8, None),
    ],
)
def test_a_group_is_one_of_our_schemes_or_left_to_others(weights, inputs, scheme):
    found = detect(compressed("int-quantized", weights, inputs)).scheme_of("model.q_proj")
    assert (found and found.name) == scheme


def test_groups_and_ignore_lists_decide_layer_by_layer():
    found = compressed(inputs=INPUTS_8)
    found["ignore"] = ["lm_head", "re:.*gate$"]
    found["config_groups"]["by_name"] = {
        "targets": ["re:.*down_proj"],
        "weights": WEIGHTS_8 | {"type": "int"},
        "input_activations": INPUTS_8 | {"type": "int"},
    }
    form = detect(found)
    layers = {"lm_head": None, "a.gate": None, "a.up_proj": "fp8", "a.down_proj": "int8"}
    for module, name in layers.items():
        scheme = form.scheme_of(module)
        assert (scheme and scheme.name) == name


def test_a_bitmask_names_its_layers_apart_from_the_quantized_ones():
    found = config(next(case for case in CASES if case.name == "bitmask-fp8"))
    found["sparsity_config"] |= {"ignore": ["lm_head", "a.q_proj"]}
    form = detect(found)
    assert form.scheme_of("a.q_proj") is None
    assert form.scheme_of("a.k_proj").name == "fp8"
    assert "sparsity_config" not in form.stock_config()
    found["sparsity_config"] |= {"targets": ["a.v_proj"]}
    assert detect(found).scheme_of("a.k_proj") is None


def test_pass_through_leaves_every_layer_to_vllm():
    form = detect(compressed(inputs=INPUTS_8, sparsity=DENSE))
    assert form.scheme_of("a.q_proj") is None
    assert form.stock_config() == compressed(inputs=INPUTS_8)
    with pytest.raises(FormatError, match=r"a.q_proj: nothing in this checkpoint is 2:4 by its config"):
        form.tensors("a.q_proj", 8, 8, torch.bfloat16)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"config_groups": [1]}, "config_groups must be an object"),
        ({"config_groups": {"g": 1}}, "g of config_groups must be an object"),
        ({"config_groups": {"g": {"targets": "Linear"}}}, "targets of g must be a list of module names"),
        ({"config_groups": {"g": {"targets": ["re:["]}}}, "targets of g has a bad pattern"),
        ({"config_groups": {"g": {"weights": []}}}, "weights of g must be an object"),
        ({"config_groups": {"g": {"weights": {}, "input_activations": 1}}}, "input_activations of g must be an object"),
        ({"ignore": {"a": 1}}, "ignore must be a list of module names"),
    ],
)
def test_a_compressed_tensors_config_that_is_wrong_is_an_error(found, message):
    with pytest.raises(FormatError, match=f"quantization_config: {message}"):
        detect(compressed(inputs=INPUTS_8) | found)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"bits": 3}, "bits 3 of a marlin_24 checkpoint is not one of 4, 8"),
        ({"bits": True}, "bits True of a marlin_24 checkpoint"),
        ({"group_size": 64}, "group_size 64 of a marlin_24 checkpoint is not one of -1, 128"),
        ({"desc_act": True}, "a marlin_24 checkpoint is symmetric and not in activation order"),
        ({"sym": False}, "a marlin_24 checkpoint is symmetric and not in activation order"),
    ],
)
def test_a_gptq_config_that_is_wrong_is_an_error(found, message):
    base = {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": 4, "group_size": 128}
    with pytest.raises(FormatError, match=f"quantization_config: {message}"):
        detect(base | found)


def test_marlin_refuses_what_it_never_held():
    found = config(next(case for case in CASES if case.name == "marlin-4bit-channel"))
    found["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": 32}
    with pytest.raises(FormatError, match=r"a.q_proj: marlin-24 holds symmetric 4- or 8-bit weights"):
        detect(found).scheme_of("a.q_proj")


@pytest.mark.parametrize(
    ("name", "n", "k", "message"),
    [
        ("marlin-4bit-channel", 96, 64, "Sparse-Marlin needs a multiple of 64 output features, got 96"),
        ("marlin-4bit-channel", 64, 48, "Sparse-Marlin needs a multiple of 32 input features, got 48"),
        ("marlin-4bit-g128-k384", 64, 192, "group size 128 needs a multiple of 128 input features, got 192"),
        ("packed-4bit-channel", 8, 20, "pack-quantized needs a multiple of 8 input features, got 20"),
        ("packed-4bit-g32-asymmetric", 12, 64, "zero points need a multiple of 8 output features, got 12"),
        ("packed-8bit-g64", 8, 96, "group size 64 does not divide the 96 input features"),
        ("bitmask-bf16", 8, 18, "2:4 needs a multiple of 4 input features, got 18"),
        ("quantized-fp8-channel", 8, 6, "2:4 needs a multiple of 4 input features, got 6"),
    ],
)
def test_sizes_that_a_format_cannot_hold_are_in_the_message(name, n, k, message):
    with pytest.raises(FormatError, match=f"a.q_proj: {message}"):
        detect(CONFIGS[name]).tensors("a.q_proj", n, k, torch.bfloat16)


def test_golden_layers_cover_all_zero_patterns():
    found = set()
    for case in CASES:
        groups = (layer(case)["codes"].float().unflatten(1, (-1, 4)) != 0).flatten(0, 1)
        found |= {tuple(group) for group in groups.tolist() if sum(group) <= 2}
    assert len(found) == 11


def test_weight_only_int8_is_kept_from_vllm_which_has_nothing_for_it():
    found = config(next(case for case in CASES if case.weight_only))
    form = detect(found)
    assert form.stock_config()["config_groups"] == {}
    assert detect(compressed(inputs=INPUTS_8)).stock_config() == compressed(inputs=INPUTS_8)
    tensors = {"weight": torch.ones(4, 32, dtype=torch.int8), "weight_scale": torch.ones(4, 1)}
    message = "q: 32 of 32 groups of four have more than two non-zeros, .*; vLLM itself does not serve weight-only INT8"
    with pytest.raises(FormatError, match=message) as raised:
        form.to_weight("q", tensors)
    assert not isinstance(raised.value, NotSparseError)


INT4 = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}


def mixed():
    """Return a config of fp8 attention and w4a16 in the rest."""
    made = compressed("mixed-precision", inputs=INPUTS_8, format="float-quantized")
    made["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    packed = {"targets": ["re:.*mlp.*"], "weights": INT4, "input_activations": None, "format": "pack-quantized"}
    made["config_groups"]["group_1"] = packed
    return made


def test_groups_may_be_stored_in_different_formats():
    form = detect(mixed())
    assert form.scheme_of("layers.0.self_attn.q_proj").name == "fp8"
    assert form.scheme_of("layers.0.mlp.up_proj").name == "w4a16"
    assert form.scheme_of("lm_head") is None
    specs = form.tensors("layers.0.mlp.up_proj", 64, 64, torch.bfloat16)
    assert [spec.name for spec in specs] == ["weight_packed", "weight_shape", "weight_scale"]
    with pytest.raises(FormatError, match="lm_head: the config does not say"):
        form.tensors("lm_head", 64, 64, torch.bfloat16)


def test_activations_with_a_zero_point():
    inputs = INPUTS_8 | {"type": "int", "symmetric": False}
    static = inputs | {"dynamic": False, "strategy": "tensor"}
    for given, more in ((inputs, []), (static, ["input_scale", "input_zero_point"])):
        form = detect(compressed("int-quantized", WEIGHTS_8 | {"type": "int"}, given))
        assert not form.symmetric_input("x")
        assert [spec.name for spec in form.tensors("x", 8, 16, torch.bfloat16)] == ["weight", "weight_scale", *more]
    assert detect(compressed("int-quantized", WEIGHTS_8 | {"type": "int"}, INPUTS_8 | {"type": "int"})).symmetric_input(
        "x"
    )


def test_asymmetric_fp8_is_left_to_vllm():
    found = compressed("float-quantized", WEIGHTS_8, INPUTS_8 | {"symmetric": False})
    assert detect(found).scheme_of("x") is None
    promised = found | {"format": "int-quantized", "sparsity_config": DENSE | {"format": "sparse-24-bitmask"}}
    with pytest.raises(FormatError, match="x: stored as sparse-24-bitmask, but quantized in a way that no 2:4 scheme"):
        detect(promised).scheme_of("x")
