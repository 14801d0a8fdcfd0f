"""Every input a user can get wrong gives one sentence that names it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from tests.compress.conftest import make_model
from vllm_sparse.compress import compress
from vllm_sparse.compress.recipe import make_recipe, read_recipe
from vllm_sparse.errors import FormatError, OptionError, OutputError, UnsupportedError
from vllm_sparse.formats import checkpoint

SMALL = {"num_samples": 4, "seq_len": 64, "quiet": True, "device": "cpu", "group_size": 32}


def fails(error, match, model, tmp_path, calibration=None, **options):
    out = tmp_path / "out"
    with pytest.raises(error, match=match):
        compress(model, out, calibration=calibration, **(SMALL | options))
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_no_such_path(tmp_path, text):
    fails(FormatError, "/no/such: no such model directory", "/no/such", tmp_path, text)


def test_not_a_model(tmp_path, text):
    (tmp_path / "model").mkdir()
    fails(FormatError, "not a model directory, config.json is missing", tmp_path / "model", tmp_path, text)


def test_not_a_causal_language_model(tiny, tmp_path, text):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "no_such_type", "architectures": ["X"]}))
    fails(FormatError, "not a causal language model", model, tmp_path, text)


def test_quantized_already(tiny, tmp_path, text):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    fails(UnsupportedError, "the model is quantized already; give the unquantized one", model, tmp_path, text)


def test_blocks_without_linear_layers(tmp_path, text):
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=128)
    make_model(tmp_path / "model", config=config)
    fails(UnsupportedError, "no repeated blocks with nn.Linear layers", tmp_path / "model", tmp_path, text)


def test_input_features_no_multiple_of_four(tmp_path, text):
    make_model(tmp_path / "model", intermediate_size=94)
    fails(
        FormatError,
        "model.layers.0.mlp.down_proj: 2:4 needs a multiple of 4 input features, got 94",
        tmp_path / "model",
        tmp_path,
        text,
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(tmp_path, text, bad):
    def spoil(model):
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad

    make_model(tmp_path / "model", edit=spoil)
    fails(
        FormatError,
        "model.layers.1.mlp.up_proj.weight: the weight holds NaN or Inf",
        tmp_path / "model",
        tmp_path,
        text,
    )


def test_a_missing_tensor(tiny, tmp_path, text):
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    fails(FormatError, "there is no tensor model.norm.weight, which the model needs", model, tmp_path, text)


def test_a_tensor_of_wrong_shape(tiny, tmp_path, text):
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 60)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    fails(
        FormatError,
        r"model.layers.0.mlp.up_proj.weight: expected shape \[96, 64\], the checkpoint has \[96, 60\]",
        model,
        tmp_path,
        text,
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scheme": "w5"}, "unknown scheme 'w5': expected one of bf16, fp8, int8, w4a16, w8a16"),
        ({"pruner": "random"}, "unknown pruner 'random': expected one of admm, sparsegpt, wanda, magnitude, none"),
        ({"quantizer": "awq"}, "unknown quantizer 'awq': expected one of gptq, joint, rtn"),
        (
            {"quantizer": "joint", "pruner": "magnitude"},
            "quantizer joint is a mode of pruner sparsegpt and cannot follow magnitude",
        ),
        ({"group_size": 48}, "group size 48 does not fit scheme w4a16: expected -1, 32, 64, 128"),
        ({"group_size": 64}, "down_proj: group size 64 does not divide the 96 input features"),
        ({"scheme": "fp8"}, "group size 32 does not fit scheme fp8: expected -1, since it has one scale per channel"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"refine": -1}, "refine must be at least 0, got -1"),
        ({"dampening": 2.0}, "dampening must be between 0 and 1, got 2.0"),
        ({"residual": -0.5}, "residual must be between 0 and 1, got -0.5"),
        ({"iterations": -1}, "iterations must not be negative, got -1"),
        ({"seq_len": 512}, "sequences of 512 tokens are longer than the model's 256 positions"),
        ({"device": "gpu0"}, "device 'gpu0' cannot be used here"),
        ({"ignore": ["re:.*"]}, "every linear layer is ignored, nothing is left to compress"),
        ({"colour": "red"}, "recipe: unknown option 'colour', expected one of scheme, pruner"),
        ({"seed": "zero"}, "recipe: option seed has the wrong type: 'zero'"),
    ],
)
def test_options(tiny, tmp_path, text, options, match):
    fails(OptionError, match, tiny, tmp_path, text, **options)


def test_calibration_is_asked_for_where_it_is_needed(tiny, tmp_path):
    fails(OptionError, "pruner admm with quantizer gptq needs calibration text", tiny, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.txt", "", "empty.txt: no text"),
        ("short.txt", "x = 1", "only 6 tokens, less than one sequence of 64"),
        ("no.jsonl", '{"a": 1}', "no.jsonl, line 1: expected an object with text, content or messages"),
        ("bad.jsonl", '{"text": "x"}\n{', "bad.jsonl, line 2: expected an object with text, content or messages"),
    ],
)
def test_calibration_without_text(tiny, tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    fails(OptionError, match, tiny, tmp_path, tmp_path / name)


def test_calibration_that_does_not_exist(tiny, tmp_path):
    fails(OptionError, "calibration no-such-text: ", tiny, tmp_path, "no-such-text")


def test_calibration_tokens_of_wrong_shape(tiny, tmp_path):
    fails(OptionError, r"calibration tokens must be \[samples, length\]", tiny, tmp_path, torch.ones(0, 3).long())


def test_a_full_disk(tiny, tmp_path, text, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    fails(OutputError, "No space left on device.*; nothing was left behind", tiny, tmp_path, text)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("scheme: [", "cannot be read as a YAML recipe"),
        ("- a\n- b", "expected a mapping of options, such as 'scheme: w4a16'"),
    ],
)
def test_recipes(tmp_path, content, match):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(OptionError, match=match):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_missing_recipe(tmp_path):
    with pytest.raises(OptionError, match=r"gone\.yaml: cannot be read as a YAML recipe"):
        read_recipe(tmp_path / "gone.yaml")


def test_defaults_depend_on_the_scheme():
    assert make_recipe({}).group == 128 and make_recipe({"scheme": "int8"}).group == -1
    assert make_recipe({"pruner": "magnitude"}).squares_iterations == 0


def test_too_few_tokens_are_reported(tiny, tmp_path, text):
    few = SMALL | {"num_samples": 1, "seq_len": 16}
    report = compress(tiny, tmp_path / "out", calibration=text, **few)
    assert report.layers[0].note == "only 16 calibration tokens for 64 inputs"
