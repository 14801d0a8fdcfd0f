"""Whole models through vLLM's engine: greedy tokens are those of the transformers model with the same weights.

Everything runs in float32, where no tie between two tokens is close enough for the order of a sum to decide it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.formats.golden import CASES
from tests.plugin.agreement import assert_greedy
from tests.plugin.conftest import NEW_TOKENS, PROMPTS, needs_vnni
from tests.plugin.layers import prune_to_two_of_four
from tests.plugin.models import (
    compress,
    linear_layers,
    quantize_inputs,
    random_model,
    save_dense,
    save_gptq_marlin,
    save_mixed,
    save_native,
    save_published,
)
from vllm_sparse.errors import FormatError
from vllm_sparse.kernels import choose_kernel
from vllm_sparse.kernels.reference import ReferenceKernel
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import LinearSpec

pytest.importorskip("vllm")
SPEC = LinearSpec(SCHEMES["fp8"], 128, 128, -1, torch.float32, torch.float32)
pytestmark = pytest.mark.serve


@pytest.mark.parametrize(
    ("kind", "scheme", "static"),
    [
        ("llama", "bf16", False),
        ("qwen2", "bf16", False),
        ("llama", "w4a16", False),
        ("qwen2", "w8a16", False),
        ("llama", "int8", False),
        ("qwen2", "int8", True),
        ("llama", "fp8", False),
        ("llama", "fp8", True),
    ],
)
def test_native_checkpoint(engine: Any, tmp_path: Path, kind: str, scheme: str, static: bool) -> None:
    stored = save_native(random_model(kind), tmp_path / "m", scheme, static)
    quantize_inputs(stored.reference, scheme, static)
    how = f"{kind}, static activations" if static else kind
    assert_greedy(stored.reference, PROMPTS, engine(stored.path), ("native", scheme, how))


PUBLISHED = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    ("name", "scheme", "flag"),
    [
        ("bitmask-bf16", "bf16", False),
        ("bitmask-fp8", "fp8", False),
        ("bitmask-int8", "int8", False),
        ("marlin-4bit-g128-k256", "w4a16", False),
        ("marlin-8bit-g128-k384", "w8a16", False),
        ("packed-4bit-g32", "w4a16", True),
        ("quantized-fp8-channel", "fp8", True),
        ("quantized-int8-tensor", "int8", True),
    ],
)
def test_published_checkpoint(engine: Any, tmp_path: Path, name: str, scheme: str, flag: bool) -> None:
    stored = save_published(random_model(), tmp_path / "m", PUBLISHED[name])
    quantize_inputs(stored.reference, scheme, static=False)
    options = {"quantization": "sparse24"} if flag else {}
    assert_greedy(stored.reference, PROMPTS, engine(stored.path, **options), (PUBLISHED[name].format, scheme, name))


def test_activations_with_a_zero_point(engine: Any, tmp_path: Path) -> None:
    stored = save_published(random_model("qwen2"), tmp_path / "m", PUBLISHED["bitmask-int8"], symmetric_input=False)
    quantize_inputs(stored.reference, "int8", symmetric=False)
    row = ("sparse-24-bitmask", "int8", "activations with a zero point")
    assert_greedy(stored.reference, PROMPTS, engine(stored.path), row)


def test_gptq_marlin_checkpoint(engine: Any, tmp_path: Path) -> None:
    stored = save_gptq_marlin(random_model(), tmp_path / "m")
    assert_greedy(stored.reference, PROMPTS, engine(stored.path), ("gptq_marlin_24", "w4a16", ""))


def test_mixed_precision_checkpoint(engine: Any, tmp_path: Path) -> None:
    stored = save_mixed(random_model(), tmp_path / "m")
    row = ("mixed-precision", "fp8, w4a16", "")
    assert_greedy(stored.reference, PROMPTS, engine(stored.path, quantization="sparse24"), row)


def test_bitmask_of_another_dtype_than_the_model_runs_in(engine: Any, tmp_path: Path) -> None:
    stored = save_published(random_model(), tmp_path / "m", PUBLISHED["bitmask-bf16"])
    continued = engine(stored.path, dtype="float16")
    with torch.no_grad():
        for prompt, one in zip(PROMPTS, continued, strict=True):
            logits = stored.reference.float()(torch.tensor([prompt + one.tokens])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(-1, torch.tensor(one.tokens)[:, None])[:, 0]
            assert float((logits.max(-1).values - chosen).max()) < 0.05  # fp16 activations, logits up to 8


@needs_vnni
def test_checkpoint_that_vllm_refuses_for_its_config_alone(engine: Any, tmp_path: Path) -> None:
    """One whose ``sparsity_config`` says "dense" (vLLM issue 51188): vLLM's own methods serve it, without a flag."""
    stored = save_published(random_model(), tmp_path / "m", PUBLISHED["quantized-int8-tensor"])
    file = stored.path / "config.json"
    config = json.loads(file.read_text())
    dense = {"format": "dense", "targets": ["Linear"], "sparsity_structure": "unstructured", "global_sparsity": 0.1}
    config["quantization_config"]["sparsity_config"] = dense
    file.write_text(json.dumps(config))
    quantize_inputs(stored.reference, "int8", static=False)
    row = ("pass-through", "int8", "vLLM's own method")
    assert_greedy(stored.reference, PROMPTS, engine(stored.path), row)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_positions", lambda tensor: tensor * 0, "qkv_proj: positions of a 2:4 group are out of order"),
        ("weight_scale", lambda tensor: tensor * -1, "qkv_proj: a weight scale is zero, negative"),
        ("weight_scale", lambda tensor: tensor.flatten(), r"qkv_proj: tensor weight_scale: expected shape \[128, 1\]"),
    ],
)
def test_errors_name_the_layer_and_the_file(engine: Any, tmp_path: Path, name: str, change: Any, message: str) -> None:
    file = save_native(random_model(), tmp_path / "m", "fp8").path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.1.self_attn.q_proj.{name}"] = change(tensors[f"model.layers.1.self_attn.q_proj.{name}"])
    save_file(tensors, file)
    with pytest.raises(FormatError, match=f"^{file}: model.layers.1.self_attn.{message}"):
        engine(file.parent)


def test_dense_checkpoint_with_a_layer_that_is_not_sparse(engine: Any, tmp_path: Path) -> None:
    model = random_model("qwen2")
    linear_layers(model)["model.layers.1.mlp.down_proj"].weight.data.normal_(std=0.08)
    path = save_dense(model, tmp_path / "m")
    row = ("dense", "bf16", "one layer not 2:4")
    assert_greedy(model, PROMPTS, engine(path, quantization="sparse24"), row)


def test_dense_checkpoint_quantized_while_loading(engine: Any, tmp_path: Path) -> None:
    path = save_dense(random_model(), tmp_path / "dense")
    model = random_model()
    for name, weight in compress(model, "w4a16", short_scales=False).items():
        model.get_submodule(name).weight.data = weight.to_dense()
    row = ("dense", "w4a16", "quantized while loading")
    assert_greedy(model, PROMPTS, engine(path, {"scheme": "w4a16"}, quantization="sparse24"), row)


@pytest.mark.parametrize("stored", ["native", "dense"])
def test_dummy_weights(engine: Any, tmp_path: Path, stored: str) -> None:
    model = random_model()
    path = save_dense(model, tmp_path / "m") if stored == "dense" else save_native(model, tmp_path / "m", "fp8").path
    options = {"quantization": "sparse24"} if stored == "dense" else {}
    assert len(engine(path, load_format="dummy", **options)) == len(PROMPTS)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_compiled_model(engine: Any, tmp_path: Path, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if choose_kernel(SPEC, torch.device("cpu")).name != "cpu" and kernel == "cpu":
        pytest.skip("the CPU kernels are not built")
    # In the second case as on a GPU: vLLM quantizes the activations outside of the kernel, in what is compiled.
    monkeypatch.setattr(ReferenceKernel, "quantizes_input", False)
    stored = save_native(random_model(), tmp_path / "m", "fp8")
    quantize_inputs(stored.reference, "fp8", static=False)
    continued = engine(stored.path, {"kernel": kernel}, enforce_eager=False)
    assert_greedy(stored.reference, PROMPTS, continued, ("native", "fp8", f"compiled, kernel {kernel}"))


@pytest.mark.parametrize("scheme", ["int8"])
def test_two_tensor_parallel_processes(engine: Any, tmp_path: Path, scheme: str) -> None:
    stored = save_native(random_model("qwen2", intermediate_size=512), tmp_path / "m", scheme)
    quantize_inputs(stored.reference, scheme, static=False)
    row = ("native", scheme, "two tensor-parallel processes")
    assert_greedy(stored.reference, PROMPTS, engine(stored.path, tensor_parallel_size=2), row)


def test_trained_model(engine: Any, tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "shared" / "models" / "pyllama-27m"
    if not source.is_dir():
        pytest.skip("the trained model pyllama-27m is not there")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for module in linear_layers(model).values():
        module.weight.data = prune_to_two_of_four(module.weight.data)
    stored = save_native(model, tmp_path / "m", "bf16")
    prompt = AutoTokenizer.from_pretrained(source)("def read_lines(path):\n    with open(")["input_ids"]
    wanted = stored.reference.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    (continued,) = engine(stored.path, prompts=[prompt])
    assert continued.tokens == wanted[0, len(prompt) :].tolist()


def test_lora_on_top(engine: Any, tmp_path: Path) -> None:
    stored = save_native(random_model(), tmp_path / "m", "w4a16")
    adapter = tmp_path / "adapter"
    targets = ["q_proj", "v_proj", "down_proj"]
    tensors = {}
    for name, module in linear_layers(stored.reference).items():
        if name.rpartition(".")[2] not in targets:
            continue
        a, b = torch.randn(8, module.in_features) * 0.1, torch.randn(module.out_features, 8) * 0.1
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        module.weight.data += 2 * b @ a  # lora_alpha / r
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    continued = engine(stored.path, adapter=adapter, enable_lora=True, max_lora_rank=8)
    assert_greedy(stored.reference, PROMPTS, continued, ("native", "w4a16", "LoRA"))
