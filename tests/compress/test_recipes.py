"""Recipes written for llm-compressor mean the same here, or are refused by name."""

import pytest
import yaml

from vllm_sparse.compress.recipe import make_recipe, read_recipe
from vllm_sparse.errors import OptionError

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
        ({"SparseGPTModifier": {"sparsity": 0.7}}, "must ask for sparsity 0.5 and mask_structure 2:4"),
        ({"SparseGPTModifier": {"mask_structure": "4:8"}}, "must ask for sparsity 0.5 and mask_structure 2:4"),
        ({"SparseGPTModifier": {"sparsity_profile": "owl"}}, "setting sparsity_profile of SparseGPTModifier"),
        ({"GPTQModifier": {"scheme": "W4A16", "targets": ["q_proj"]}}, "targets of GPTQModifier must be Linear"),
    ],
)
def test_what_has_no_equivalent_is_named(tmp_path, modifier, match):
    with pytest.raises(OptionError, match=f"recipe.yaml: .*{match}"):
        read_recipe(write(tmp_path, yaml.safe_dump(modifier)))
