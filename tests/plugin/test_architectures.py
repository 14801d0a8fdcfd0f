"""Models that are more than a stack of linear layers: a tower for images, latent attention, shared experts.

What vLLM itself says with the same weights, dense, is the reference: it serves some of these in its own way (a prefix
that sees what comes after it, another order of rotary features), which is none of the plugin's business.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.plugin.agreement import assert_same
from tests.plugin.conftest import PROMPTS, VllmContext, running
from tests.plugin.layers import format_of, load, new_config, prune_to_two_of_four, random_hub
from tests.plugin.models import SIZES, save_tokenizer
from vllm_sparse.formats.convert import convert
from vllm_sparse.scheme import SCHEMES

pytest.importorskip("vllm")
IMAGE_TOKEN = 300


def refill(path: Path, sparse: Callable[[str], bool], rename: Callable[[str], str] = str) -> None:
    """Give the matrices of a checkpoint random numbers, 2:4 where ``sparse(name)``, and its tensors other names."""

    def filled(name: str, old: Tensor) -> Tensor:
        if old.dim() != 2:
            return old
        new = torch.randn(old.shape) * (0.08 if sparse(name) else 0.2)
        return (prune_to_two_of_four(new) if sparse(name) else new).to(old.dtype)

    file = path / "model.safetensors"
    state = {rename(name): filled(name, tensor) for name, tensor in load_file(file).items()}
    save_file(state, file, {"format": "pt"})


def save_paligemma(path: Path) -> Path:
    """Write a model for images and text, 2:4 in its language model alone, and what makes patches of images."""
    from transformers import (
        AutoModelForImageTextToText,
        AutoTokenizer,
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaProcessor,
        SiglipVisionConfig,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**sizes, image_size=28, patch_size=14, vision_use_head=False)
    text = GemmaConfig(**SIZES | {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh"})
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, projection_dim=128, dtype="bfloat16"
    )
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(path)
    refill(
        path,
        lambda name: "language_model" in name and "embed" not in name,
        lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    )
    save_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["\n", *(f"<{i}>" for i in range(len(tokenizer) + 1, IMAGE_TOKEN))])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def _no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM ask whether a vision tower is Pixtral's where that model's imports fail."""
    if find_spec("torchvision") is None:
        pixtral: Any = ModuleType("vllm.model_executor.models.pixtral")
        pixtral.PixtralHFEncoderInfo = pixtral.PixtralVisionConfig = type("Never", (), {})
        monkeypatch.setitem(sys.modules, pixtral.__name__, pixtral)


@pytest.mark.serve
@pytest.mark.usefixtures("_no_torchvision")
def test_language_model_of_a_model_for_images(tmp_path: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8, generator=generator).numpy() for _ in PROMPTS]
    images = [Image.fromarray(one) for one in pixels]
    path = save_paligemma(tmp_path / "m")
    with running(path) as run:
        dense = run.generate() + run.generate(images=images)
    with running(path, quantization="sparse24") as run:
        found = run.generate() + run.generate(images=images)
        sparse = run.llm.apply_model(lambda model: sum("packed" in name for name, _ in model.named_parameters()))
    assert sparse == [2 * 4]  # of two layers
    assert_same(found, dense, ("dense", "bf16", "paligemma"))
    assert convert(path, tmp_path / "native").sparse == 2 * 7
    with running(tmp_path / "native") as run:
        native = run.generate() + run.generate(images=images)
    assert_same(native, dense, ("native", "bf16", "paligemma"))


def save_deepseek(path: Path, **changes: Any) -> Path:
    """Write a DeepSeek-V2 with latent attention of the one size that vLLM has on the CPU."""
    from transformers import AutoModelForCausalLM, DeepseekV2Config

    torch.manual_seed(0)
    heads = {"num_key_value_heads": 4, "qk_nope_head_dim": 32, "v_head_dim": 32}
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": None}
    dense = {"first_k_dense_replace": 2, "n_routed_experts": 4}
    config = DeepseekV2Config(**SIZES | heads | latent | dense | changes)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    refill(path, lambda name: not any(part in name for part in ("embed", "lm_head", "gate.weight")))
    save_tokenizer(path)
    return path


EXPERTS = {"first_k_dense_replace": 1, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.mark.serve
@pytest.mark.parametrize(
    ("how", "changes"),
    [("q through a latent too", {"q_lora_rank": 64}), ("shared experts", EXPERTS | {"n_group": 1, "topk_group": 1})],
)
def test_latent_attention(tmp_path: Path, how: str, changes: dict[str, Any]) -> None:
    path = save_deepseek(tmp_path / "m", **changes)
    with running(path) as run:
        dense = run.generate()
    with running(path, quantization="sparse24") as run:
        assert_same(run.generate(), dense, ("dense", "bf16", f"deepseek_v2, {how}"))


@pytest.mark.parametrize("static", [None, 1e-3])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_latent_attention_gets_the_weights_it_asks_for(
    vllm_context: VllmContext, scheme: str, static: float | None
) -> None:
    """Also where a static scale is too small for the ones that they are multiplied with."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

    if static and SCHEMES[scheme].activation is None:
        pytest.skip("activations are not quantized")
    weight = random_hub(64, 128, scheme, input_scale=static)
    with vllm_context():
        config = new_config(format_of(weight))
        layer = ColumnParallelLinear(128, 64, bias=False, quant_config=config, prefix="a.kv_b_proj")
        load(layer, format_of(weight).from_weight(weight))
        layer.quant_method.process_weights_after_loading(layer)
        got = get_and_maybe_dequant_weights(layer, torch.float32)
    torch.testing.assert_close(got, weight.to_dense(), rtol=1e-5, atol=1e-6)
