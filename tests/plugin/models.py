"""Tiny random models whose linear layers are 2:4, on disk as dense and as native checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from tests.formats.encoders import encode_bitmask, encode_marlin, encode_packed
from tests.formats.golden import Case
from tests.formats.golden import config as golden_config
from tests.plugin.layers import prune_to_two_of_four
from vllm_sparse.formats import Sparse24Format
from vllm_sparse.formats.checkpoint import CheckpointWriter
from vllm_sparse.formats.embedding import dequantize_rows, quantize_table
from vllm_sparse.kernels.reference import quantize_activations, quantize_asymmetric
from vllm_sparse.plugin.made_up import quantize_at_load
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}


STATIC_SCALE = 0.05


@dataclass
class Stored:
    """A checkpoint and the dense model with the very same (dequantized) weights."""

    path: Path
    reference: PreTrainedModel


def linear_layers(model: PreTrainedModel, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, torch.nn.Linear]:
    """Return the layers that are compressed: every linear one but the head, if ``ignore`` has it."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (name != "lm_head" or name not in ignore)
    }


def random_model(kind: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random bf16 model, 2:4 in every linear layer but the head; ``kind`` qwen2 has biases."""
    torch.manual_seed(seed)
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**SIZES | changes)
    config.architectures = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]]
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies stay float32
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.1
        model.lm_head.weight.normal_(std=0.2)
        for module in linear_layers(model).values():
            module.weight.normal_(std=0.08)
            module.weight.copy_(prune_to_two_of_four(module.weight))
    return model


def save_tokenizer(path: Path) -> None:
    """Write a tokenizer of one token per byte, enough for vLLM to start."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)


def save_dense(model: PreTrainedModel, path: Path) -> Path:
    """Write ``model`` as an ordinary checkpoint."""
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def compress(
    model: PreTrainedModel,
    scheme_name: str,
    static: bool = False,
    short_scales: bool = True,
    ignore: tuple[str, ...] = ("lm_head",),
) -> dict[str, Sparse24Weight]:
    """Return the 2:4 weights of ``model``'s linear layers in a scheme, ``short_scales`` such that bf16 holds them."""
    weights = {}
    for name, module in linear_layers(model, ignore).items():
        weight = Sparse24Weight.from_dense(module.weight.detach(), SCHEMES["bf16"], layer=name)
        weight = quantize_at_load(weight, SCHEMES[scheme_name], name)
        if weight.scales is not None and short_scales:
            weight = replace(weight, scales=weight.scales.bfloat16().float())
        weights[name] = replace(weight, input_scale=torch.tensor([STATIC_SCALE])) if static else weight
    return weights


def save_native(
    model: PreTrainedModel,
    path: Path,
    scheme_name: str,
    static: bool = False,
    ignore: tuple[str, ...] = ("lm_head",),
    embeddings: tuple[str, ...] = (),
) -> Stored:
    """Write ``model`` as a native checkpoint, with ``embeddings`` in 8 bits."""
    weights = compress(model, scheme_name, static, ignore=ignore)
    weights = {name: weight for name, weight in weights.items() if name not in ignore}
    group_size = next(iter(weights.values())).group_size
    fmt = Sparse24Format(
        SCHEMES[scheme_name], group_size=group_size, static_input=static, ignore=ignore, embeddings=embeddings
    )
    return save_as(model, path, weights, fmt.from_weight, fmt.to_config(), embeddings)


def save_published(model: PreTrainedModel, path: Path, case: Case, symmetric_input: bool = True) -> Stored:
    """Write ``model`` in the published format of a golden ``case``, 4-bit weights in groups of 128."""
    bits = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}.get(case.dtype, "int8")
    scheme = "w4a16" if case.bits == 4 else bits
    scheme = "w8a16" if case.bits == 8 and case.format == "marlin-24" else scheme
    case = replace(case, group_size=128 if SCHEMES[scheme].grouped else -1)

    def encode(weight: Sparse24Weight) -> dict[str, Tensor]:
        codes = weight.to_dense_codes()
        scales = {} if weight.scales is None else {"weight_scale": weight.scales}
        if case.format == "sparse-24-bitmask":
            return encode_bitmask(codes) | scales
        if case.format == "marlin-24":
            assert weight.scales is not None
            return encode_marlin(codes, weight.scales.half(), case.bits, weight.k // 2 > 128)
        if case.format == "pack-quantized":
            return encode_packed(codes, 4, None) | scales
        return {"weight": codes} | scales

    said = golden_config(case)
    if not symmetric_input:
        said["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    return save_as(model, path, compress(model, scheme), encode, said)


def save_gptq_marlin(model: PreTrainedModel, path: Path) -> Stored:
    """Write ``model`` as ``gptq_marlin_24``, 4 bits in groups of 128."""
    names = {"weight_packed": "B_24", "meta": "B_meta", "scale_packed": "s"}

    def encode(weight: Sparse24Weight) -> dict[str, Tensor]:
        assert weight.scales is not None
        tensors = encode_marlin(weight.to_dense_codes(), weight.scales.half(), 4, weight.k > 128)
        return {names[name]: tensor for name, tensor in tensors.items()}

    said = {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": 4, "group_size": 128}
    return save_as(model, path, compress(model, "w4a16"), encode, said | {"desc_act": False, "sym": True})


def save_mixed(model: PreTrainedModel, path: Path) -> Stored:
    """Write ``model`` as ``mixed-precision``: attention float-quantized fp8, the rest pack-quantized in 4 bits."""
    kinds = {name: compress(model, name) for name in ("fp8", "w4a16")}
    weights = {name: kinds["fp8" if "self_attn" in name else "w4a16"][name] for name in linear_layers(model)}

    def encode(weight: Sparse24Weight) -> dict[str, Tensor]:
        codes = weight.to_dense_codes()
        tensors = {"weight": codes} if weight.scheme.name == "fp8" else encode_packed(codes, 4, None)
        assert weight.scales is not None
        return tensors | {"weight_scale": weight.scales}

    common = {"symmetric": True, "dynamic": False}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"} | common
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128} | common
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    groups = {
        "group_0": {
            "targets": ["re:.*self_attn.*"],
            "weights": fp8,
            "input_activations": inputs,
            "format": "float-quantized",
        },
        "group_1": {
            "targets": ["re:.*mlp.*"],
            "weights": int4,
            "input_activations": None,
            "format": "pack-quantized",
        },
    }
    said = {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head"]}
    stored = save_as(model, path, weights, encode, said | {"config_groups": groups})
    quantize_inputs(stored.reference, "fp8", only="self_attn")
    return stored


def save_as(
    model: PreTrainedModel,
    path: Path,
    weights: Mapping[str, Sparse24Weight],
    encode: Callable[[Sparse24Weight], dict[str, Tensor]],
    quantization_config: dict[str, Any],
    embeddings: tuple[str, ...] = (),
) -> Stored:
    """Write ``model`` with ``weights`` in some format; give ``model`` the dequantized weights in float32."""
    state: dict[str, Tensor] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    model = model.float()
    for name, weight in weights.items():
        del state[f"{name}.weight"]
        state |= {f"{name}.{key}": tensor for key, tensor in encode(weight).items()}
        model.get_submodule(name).weight.data.copy_(weight.to_dense())
    for name in embeddings:
        table = quantize_table(state.pop(f"{name}.weight"))
        state |= {f"{name}.{key}": tensor for key, tensor in table.items()}
        dequantized = dequantize_rows(table["weight"], table["weight_scale"], torch.float32)
        model.get_submodule(name).weight.data.copy_(dequantized)
    config = model.config.to_dict() | {"dtype": "bfloat16", "quantization_config": quantization_config}
    with CheckpointWriter(path) as writer:
        for key in sorted(state):
            writer.add(key, state[key])
        writer.write_json("config.json", config)
    save_tokenizer(path)
    return Stored(path, model)


@dataclass
class InputQuantizer:
    """Rounds the inputs of linear layers as a scheme does, after moving each by a random ``noise`` times itself."""

    dtype: torch.dtype
    static: bool
    symmetric: bool = True
    noise: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if self.noise:
            x = x * (1 + self.noise * torch.randn_like(x))
        if not self.symmetric:
            codes, scales, zeros = quantize_asymmetric(x.flatten(0, -2), None, None)
            return ((codes - zeros) * scales).view_as(x)
        scale = torch.tensor([STATIC_SCALE]) if self.static else None
        codes, scales = quantize_activations(x.flatten(0, -2), self.dtype, scale)
        return (codes.float() * scales).view_as(x)


def quantize_inputs(
    model: PreTrainedModel, scheme_name: str, static: bool = False, only: str = "", symmetric: bool = True
) -> InputQuantizer | None:
    """Make linear layers with ``only`` in their names quantize their inputs as the scheme does, if it does."""
    dtype = SCHEMES[scheme_name].activation
    if dtype is None:
        return None
    quantizer = InputQuantizer(dtype, static, symmetric)
    model.input_quantizer = quantizer
    for module in (module for name, module in linear_layers(model).items() if only in name):
        module.register_forward_pre_hook(lambda _, arguments: (quantizer(arguments[0]),))
    return quantizer
