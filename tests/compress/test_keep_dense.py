"""Layers that stay dense by a rule: those that were made to deserve it, whole groups of them, and at a known cost."""

import json

import pytest
import torch

from tests.compress.conftest import config_of, make_model
from tests.compress.test_experts import CONFIGS
from vllm_sparse.compress import compress
from vllm_sparse.compress.keep_dense import KeepDense
from vllm_sparse.compress.pipeline import dry_run
from vllm_sparse.errors import OptionError
from vllm_sparse.formats.checkpoint import Checkpoint

SMALL = {"num_samples": 8, "seq_len": 64, "device": "cpu", "scheme": "int8"}
QKV = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]


def sensitive(model):
    """Give the second attention inputs with a long tail, and weights with outliers."""
    with torch.no_grad():
        layer = model.model.layers[1]
        layer.input_layernorm.weight[::16] = 30.0
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight[:, ::16] *= 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), edit=sensitive)


@pytest.mark.parametrize("rule", ["owl:1", "kurtosis:0.2"])
def test_the_layers_that_deserve_it_stay_dense(model, text, tmp_path, rule):
    report = compress(model, tmp_path / "out", calibration=text, keep_dense=rule, quiet=True, **SMALL)
    assert list(report.kept[0].layers) == QKV
    if rule.endswith(":1"):
        assert len(report.kept) == 1 and len(report.layers) == 11
    else:
        dense = sum(weight.numel() for name, weight in weights(model).items() if name in names_of(report))
        assert dense <= 0.2 * sum(weight.numel() for weight in weights(model).values())
    assert set(config_of(tmp_path / "out")["quantization_config"]["ignore"]) == {"lm_head"} | names_of(report)
    before, after = weights(model), Checkpoint(tmp_path / "out")
    assert all(torch.equal(before[name], after.load(f"{name}.weight")) for name in names_of(report))
    saved = json.loads((tmp_path / "out/report.json").read_text())
    assert saved["kept"][0]["layers"] == QKV and saved["kept"][0]["score"] > 0
    assert f"by {rule}, 0.0 MB more" in report.summary()
    assert f"Of these, `{rule}` chose:" in (tmp_path / "out/README.md").read_text()
    # The cost is what the checkpoint is larger by.
    whole = compress(model, tmp_path / "whole", calibration=text, quiet=True, **SMALL)
    assert report.bytes_after - whole.bytes_after == sum(kept.extra_bytes for kept in report.kept)


def names_of(report):
    return {name for kept in report.kept for name in kept.layers}


def weights(path):
    checkpoint = Checkpoint(path)
    names = [name for name in checkpoint.tensors if name.endswith("_proj.weight")]
    return {name.removesuffix(".weight"): checkpoint.load(name) for name in names}


def test_a_plan_knows_what_stays_dense(model, text, tmp_path):
    plan = dry_run(model, tmp_path / "out", calibration=text, keep_dense="kurtosis:1", **SMALL)
    assert set(QKV) <= set(plan.dense) and sum(plan.shapes.values()) == 11


def test_experts_stay_dense_together(text, tmp_path):
    make_model(tmp_path / "model", config=CONFIGS["mixtral"])
    report = compress(tmp_path / "model", tmp_path / "out", calibration=text, keep_dense="owl:5", quiet=True, **SMALL)
    experts = [kept for kept in report.kept if ".experts." in kept.layers[0]]
    assert len(report.kept) == 5 and all(len(kept.layers) == 12 for kept in experts)


@pytest.mark.parametrize("text_", ["owl", "owl:0", "owl:2.5", "size:3", "owl:x", ":1"])
def test_what_is_no_rule_is_refused(text_):
    with pytest.raises(OptionError, match=r"unknown keep_dense .*: expected owl or kurtosis, a colon, and a share"):
        KeepDense.parse(text_)
