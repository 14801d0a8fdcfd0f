"""Routing: which checkpoints and which of their layers are ours; options; registration."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.plugin.conftest import VllmContext
from tests.plugin.layers import format_of, new_config, random_hub
from vllm_sparse.errors import FormatError, OptionError, UnsupportedError
from vllm_sparse.plugin.options import Options

pytest.importorskip("vllm")

NATIVE = {"quant_method": "sparse24", "version": 1, "scheme": "w4a16", "group_size": 128, "ignore": ["lm_head"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def override(config: Any, user: str | None) -> str | None:
    from vllm_sparse.plugin.config import Sparse24Config

    return Sparse24Config.override_quantization_method(config, user, hf_config=None, something_new=1)


@pytest.mark.parametrize(
    ("config", "user", "expected"),
    [
        (NATIVE, None, "sparse24"),
        (NATIVE, "sparse24", "sparse24"),
        (NATIVE, "fp8", None),
        (FP8, None, None),
        (FP8, "fp8", None),
        (FP8, "sparse24", "sparse24"),
        ({}, None, None),
        ({"quant_method": ["odd"]}, None, None),
        (None, None, None),
        (7, "awq", None),
    ],
)
def test_override_claims_what_is_ours_and_never_raises(config: Any, user: str | None, expected: str | None) -> None:
    assert override(config, user) == expected


def test_config_that_is_not_ours_says_so() -> None:
    from vllm_sparse.plugin.config import Sparse24Config

    with pytest.raises(UnsupportedError, match=r"quant_method 'fp8', format None.* is none of the 2:4 formats"):
        Sparse24Config.from_config(FP8)
    with pytest.raises(FormatError, match="scheme 'w3' is not one of"):
        Sparse24Config.from_config(NATIVE | {"scheme": "w3"})


def layer_method(config: Any, prefix: str) -> str:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear

    arguments = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config, "prefix": prefix}
    if prefix.endswith("gate_up_proj"):
        return type(MergedColumnParallelLinear(256, [64, 64], **arguments).quant_method).__name__
    return type(ReplicatedLinear(256, 64, **arguments).quant_method).__name__


@pytest.mark.parametrize(
    ("ignore", "prefix", "expected"),
    [
        ((), "model.layers.0.down_proj", "Sparse24LinearMethod"),
        (("model.layers.0.down_proj",), "model.layers.0.down_proj", "UnquantizedLinearMethod"),
        (("re:.*down_proj",), "model.layers.0.down_proj", "UnquantizedLinearMethod"),
        (("re:.*layers\\.1\\..*",), "model.layers.0.down_proj", "Sparse24LinearMethod"),
        (("m.gate_proj", "m.up_proj"), "m.gate_up_proj", "UnquantizedLinearMethod"),
        (("m.gate_up_proj",), "m.gate_up_proj", "UnquantizedLinearMethod"),
        (("other.gate_proj",), "m.gate_up_proj", "Sparse24LinearMethod"),
    ],
)
def test_ignore_lists_name_modules_or_parts_of_fused_ones(
    vllm_context: VllmContext, ignore: tuple[str, ...], prefix: str, expected: str
) -> None:
    with vllm_context():
        config = new_config(format_of(random_hub(64, 256, "w4a16"), ignore))
        assert layer_method(config, prefix) == expected


def test_fused_parts_that_disagree_are_an_error(vllm_context: VllmContext) -> None:
    with vllm_context():
        config = new_config(format_of(random_hub(64, 256, "w4a16"), ("m.up_proj",)))
        message = r"m.gate_up_proj: .*stores them differently \(gate_proj w4a16, up_proj dense\)"
        with pytest.raises(UnsupportedError, match=message):
            layer_method(config, "m.gate_up_proj")


def test_names_in_the_config_follow_the_model(vllm_context: VllmContext) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    with vllm_context():
        config = new_config(format_of(random_hub(64, 256, "bf16"), ("model.text.down_proj",)))
        config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.text.": "language_model.model."}))
        assert layer_method(config, "language_model.model.down_proj") == "UnquantizedLinearMethod"


def test_what_is_not_linear_is_left_to_vllm() -> None:
    assert new_config(None).get_quant_method(torch.nn.Embedding(4, 4), "embed_tokens") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"typo": 1}, "unknown option 'typo', expected one of strict, scheme, kernel, cpu_activations"),
        ({"strict": "yes"}, "strict must be true or false, got 'yes'"),
        ({"scheme": "w3"}, "unknown scheme 'w3'"),
        ({"kernel": "warp"}, "unknown kernel 'warp', expected one of .*reference"),
        ({"cpu_activations": "fp4"}, "cpu_activations must be 'int8', got 'fp4'"),
        ([1], "expected an object"),
    ],
)
def test_wrong_options_are_errors(vllm_context: VllmContext, options: Any, message: str) -> None:
    with vllm_context(options=options), pytest.raises(OptionError, match=message):
        layer_method(new_config(None), "down_proj")


def test_scheme_option_needs_a_dense_checkpoint(vllm_context: VllmContext) -> None:
    config = new_config(format_of(random_hub(64, 256, "bf16")))
    with (
        vllm_context(options={"scheme": "fp8"}),
        pytest.raises(OptionError, match="'fp8' applies to dense checkpoints"),
    ):
        layer_method(config, "down_proj")


def test_kernel_can_be_forced(vllm_context: VllmContext) -> None:
    with vllm_context(options={"kernel": "reference"}):
        assert layer_method(new_config(None), "down_proj") == "Sparse24DetectedLinearMethod"


@pytest.mark.parametrize(
    ("options", "scheme", "device", "kernel"),
    [
        ({"cpu_activations": "int8"}, "w4a16", "cpu", "cpu_w4a8"),
        ({"cpu_activations": "int8"}, "w4a16", "cuda", None),
        ({"cpu_activations": "int8"}, "fp8", "cpu", None),
        ({"cpu_activations": "int8", "kernel": "reference"}, "w4a16", "cpu", "reference"),
        ({}, "w4a16", "cpu", None),
    ],
)
def test_int8_activations_are_for_w4a16_on_the_cpu(
    options: dict[str, str], scheme: str, device: str, kernel: str | None
) -> None:
    spec = random_hub(64, 256, scheme).spec(torch.bfloat16)
    assert Options.parse({"sparse24": options}).kernel_for(spec, torch.device(device)) == kernel


def test_registration_is_idempotent_and_known_to_vllm() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from vllm_sparse import register
    from vllm_sparse.plugin.config import Sparse24Config

    register()
    register()
    assert QUANTIZATION_METHODS.count("sparse24") == 1
    assert get_quantization_config("sparse24") is Sparse24Config


def test_registration_without_vllm_does_nothing() -> None:
    code = "import sys; sys.modules['vllm'] = None; import vllm_sparse; vllm_sparse.register(); print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "fine\n"


def test_registration_that_fails_warns_instead_of_raising(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.model_executor.layers import quantization

    from vllm_sparse import register

    def broken(name: str) -> Any:
        raise RuntimeError("changed again")

    monkeypatch.setattr(quantization, "register_quantization_config", broken)
    logging.getLogger("vllm.vllm_sparse").addHandler(caplog.handler)
    register()
    assert "could not be registered: changed again" in caplog.text
