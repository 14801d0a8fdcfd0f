"""Recipes written for llm-compressor mean the same here, or are refused by name."""

import pytest
import yaml

from vllm_sparse.compress import compress
from vllm_sparse.compress.recipe import make_recipe, read_recipe
from vllm_sparse.errors import NotSparseError, OptionError

STAGES = """
sparsity_stage:
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      targets: [Linear]
      ignore: ["re:.*lm_head"]
quantization_stage:
  quantization_modifiers:
    GPTQModifier:
      targets: Linear
      ignore: [lm_head]
      scheme: W4A16
      dampening_frac: 0.02
"""


W4 = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}, "targets": ["Linear"]}
ASYMMETRIC = {"weights": W4["weights"] | {"symmetric": False}, "targets": ["Linear"]}
# As llm-compressor's examples and end-to-end tests have them: stages of any name, training stages, groups, mappings.
KEPT = "\n".join(f"        're:.*{name}.weight'," for name in ("q_proj", "o_proj", "up_proj", "down_proj"))
PRUNED = f"""
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      targets: ["Linear"]
      ignore: ["re:.*lm_head"]
finetuning_stage:
  run_type: train
  finetuning_modifiers:
    ConstantPruningModifier:
      targets: [
{KEPT}
      ]
      start: 0
"""
EXAMPLES = {
    "2of4_w4a16": (
        PRUNED
        + """
quantization_stage:
  run_type: oneshot
  quantization_modifiers:
    GPTQModifier:
      ignore: ["lm_head"]
      config_groups:
        group_0:
          weights: {num_bits: 4, type: "int", symmetric: true, strategy: "channel"}
          targets: ["Linear"]
""",
        {"pruner": "sparsegpt", "quantizer": "gptq", "scheme": "w4a16", "group": -1, "pattern": "2:4"},
    ),
    "2of4_w4a16_group-128": (
        PRUNED
        + """
quantization_stage:
  quantization_modifiers:
    GPTQModifier:
      ignore: ["lm_head"]
      actorder: null
      config_groups:
        group_0:
          weights: {num_bits: 4, type: "int", symmetric: true, strategy: "group", group_size: 128, actorder: "weight"}
          targets: ["Linear"]
""",
        {"scheme": "w4a16", "group": 128, "ignore": ("re:.*lm_head", "lm_head")},
    ),
    "2of4_fp8_dynamic": (
        PRUNED.replace('      targets: ["Linear"]\n', "      sequential_update: false\n")
        + """
quantization_stage:
  run_type: post_train
  quantization_modifiers:
    QuantizationModifier:
      targets: ["Linear"]
      ignore: ["lm_head"]
      scheme: "FP8_DYNAMIC"
""",
        {"pruner": "sparsegpt", "quantizer": "rtn", "scheme": "fp8", "activation": "dynamic"},
    ),
    "w8a8_int8": (
        """
quant_stage:
    quant_modifiers:
        SmoothQuantModifier:
            smoothing_strength: 0.8
            mappings: [
                [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
                [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"]
            ]
        GPTQModifier:
            sequential_update: false
            ignore: ["lm_head"]
            config_groups:
                group_0:
                    weights: {num_bits: 8, type: "int", symmetric: true, strategy: "channel"}
                    input_activations: {num_bits: 8, type: "int", symmetric: true, dynamic: true, strategy: "token"}
                    targets: ["Linear"]
""",
        {"pruner": "none", "scheme": "int8", "smooth": 0.8, "activation": "dynamic", "quantizer": "gptq"},
    ),
    "int8_static": (
        """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.8
    GPTQModifier:
      ignore: [lm_head]
      actorder: null
      config_groups:
        group_0:
          weights: {num_bits: 8, type: int, symmetric: true, strategy: channel}
          input_activations: {num_bits: 8, type: int, symmetric: true, strategy: tensor, observer: static_minmax}
          targets: [Linear]
""",
        {"scheme": "int8", "activation": "static", "smooth": 0.8},
    ),
    "written_by_oneshot": (
        """
default_stage:
  default_modifiers:
    WandaPruningModifier:
      sparsity: 0.5
      mask_structure: '2:4'
      targets: [Linear]
      ignore: ['re:.*lm_head']
    QuantizationModifier:
      targets: [Linear]
      ignore: [lm_head, 're:.*mlp.gate$']
      scheme: FP8
""",
        {
            "pruner": "wanda",
            "quantizer": "rtn",
            "scheme": "fp8",
            "activation": "static",
            "ignore": ("re:.*lm_head", "lm_head", "re:.*mlp.gate$"),
        },
    ),
    "unstructured": (
        """
sparsity_stage:
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.7, block_size: 128, dampening_frac: 0.001, targets: [Linear]}
""",
        {"pattern": "0.7", "format": "dense", "scheme": "bf16", "dampening": 0.001},
    ),
    "one_zero_in_four": (
        """
test_stage:
  test_modifiers:
    SparseGPTModifier: {sparsity: 0.25, mask_structure: "1:4"}
    GPTQModifier: {scheme: {w4a16: [Linear]}}
""",
        {"pattern": "3:4", "format": "dense", "scheme": "w4a16", "group": 128},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_recipes_as_llm_compressor_has_them(tmp_path, name):
    text, expected = EXAMPLES[name]
    recipe = make_recipe(read_recipe(write(tmp_path, text)))
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.squares_iterations == 0


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"w8a8_int8"}))  # of an older release than 0.14
def test_llm_compressor_reads_them_alike(name):
    """Where it is installed: the recipes above are recipes to it, of the modifiers that were read from them here."""
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")
    from llmcompressor.recipe import Recipe

    recipe = Recipe.create_instance(EXAMPLES[name][0])
    assert {type(modifier).__name__ for modifier in recipe.modifiers} >= {
        word.strip(" :{") for word in EXAMPLES[name][0].split() if word.rstrip(":").endswith("Modifier")
    } - {"ConstantPruningModifier"}


@pytest.mark.parametrize("name", ["2of4_w4a16", "w8a8_int8", "unstructured"])
def test_a_recipe_compresses_a_model(tiny, text, tmp_path, name):
    file, options = (
        write(tmp_path, EXAMPLES[name][0]),
        {"num_samples": 4, "seq_len": 64, "quiet": True, "device": "cpu"},
    )
    if name == "w8a8_int8":  # asks for no pruning, so a model that is pruned already
        with pytest.raises(NotSparseError, match=r"q_proj: .* have more than two non-zeros"):
            compress(tiny, tmp_path / "out", calibration=text, recipe=file, **options)
        options["pruner"] = "magnitude"
    report = compress(tiny, tmp_path / "out", calibration=text, recipe=file, **options)
    assert report.verification.violations == 0 and len(report.layers) == 14


def write(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_stages_of_pruning_and_quantizing(tmp_path):
    recipe = make_recipe(read_recipe(write(tmp_path, STAGES)))
    assert (recipe.pruner, recipe.quantizer, recipe.scheme, recipe.group) == ("sparsegpt", "gptq", "w4a16", 128)
    assert recipe.dampening == 0.02 and recipe.ignore == ("re:.*lm_head", "lm_head")
    assert recipe.squares_iterations == 0  # what was asked for, and nothing better


@pytest.mark.parametrize(
    ("modifier", "expected"),
    [
        ({"QuantizationModifier": {"scheme": "FP8_DYNAMIC"}}, ("none", "rtn", "fp8")),
        ({"WandaPruningModifier": {"mask_structure": "2:4"}}, ("wanda", "gptq", "bf16")),
        ({"MagnitudePruningModifier": None, "QuantizationModifier": {"scheme": "W8A8"}}, ("magnitude", "rtn", "int8")),
    ],
)
def test_single_modifiers(tmp_path, modifier, expected):
    recipe = make_recipe(read_recipe(write(tmp_path, yaml.safe_dump(modifier))))
    assert (recipe.pruner, recipe.quantizer, recipe.scheme) == expected


@pytest.mark.parametrize(
    ("modifier", "match"),
    [
        ({"AWQModifier": {}}, "modifier AWQModifier has no equivalent here"),
        ({"GPTQModifier": {"scheme": "NVFP4"}}, "scheme 'NVFP4' of GPTQModifier is none of W4A16, W8A16"),
        ({"SparseGPTModifier": {"sparsity": [0.5, 0.6]}}, r"sparsity \[0.5, 0.6\], not N:M or a number"),
        ({"SparseGPTModifier": {"mask_structure": "2:3"}}, "SparseGPTModifier: unknown pattern '1:3'"),
        ({"SparseGPTModifier": {"mask_structure": "2:4", "sparsity": 0.7}}, "is a sparsity of 0.5, not 0.7"),
        (
            {"SmoothQuantModifier": {"ignore": ["model.norm"]}},
            "setting ignore of SmoothQuantModifier has no equivalent",
        ),
        (
            {"QuantizationModifier": {"scheme": "W4A16", "kv_cache_scheme": {}}},
            "setting kv_cache_scheme of Quantization",
        ),
        (
            {"GPTQModifier": {"config_groups": {"a": ASYMMETRIC}}},
            "ask for a quantization that none of the schemes here is",
        ),
        ({"GPTQModifier": {"config_groups": {"a": W4, "b": W4}}}, "must be one group, got 2"),
        ({"SparseGPTModifier": {"sparsity_profile": "owl"}}, "setting sparsity_profile of SparseGPTModifier"),
        ({"GPTQModifier": {"scheme": "W4A16", "targets": ["q_proj"]}}, "targets of GPTQModifier must be Linear"),
    ],
)
def test_what_has_no_equivalent_is_named(tmp_path, modifier, match):
    with pytest.raises(OptionError, match=f"recipe.yaml: .*{match}"):
        read_recipe(write(tmp_path, yaml.safe_dump(modifier)))
