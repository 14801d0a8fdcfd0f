"""Tiny random mixtures of experts whose linear layers are 2:4, on disk and as the model that they have to equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen3MoeConfig

from tests.plugin.layers import prune_to_two_of_four
from tests.plugin.models import SIZES, Stored, quantize_inputs, save_tokenizer
from vllm_sparse.formats import Sparse24Format
from vllm_sparse.formats.checkpoint import CheckpointWriter
from vllm_sparse.plugin.made_up import quantize_at_load
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight

CONFIGS = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 128, "head_dim": 32},
    ),
}
_DENSE = ("embed", "norm", "lm_head", ".gate.")


def is_linear(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor of a checkpoint is the weight of a layer that is compressed."""
    return tensor.dim() == 2 and not any(part in name for part in _DENSE)


def save_dense(path: Path, kind: str, dense_layers: tuple[str, ...] = (), seed: int = 0) -> Path:
    """Write a random bf16 mixture, 2:4 but for the head, the routers and ``dense_layers``, as transformers does."""
    torch.manual_seed(seed)
    config_class, changes = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(config_class(**SIZES | changes)).to(torch.bfloat16)
    model.save_pretrained(path)
    state = load_file(path / "model.safetensors")
    for name, tensor in state.items():
        if is_linear(name, tensor):
            dense = torch.randn(tensor.shape) * 0.12
            whole = any(part in name for part in dense_layers)
            state[name] = (dense if whole else prune_to_two_of_four(dense)).bfloat16()
        elif tensor.dim() == 2:
            state[name] = (torch.randn(tensor.shape) * 0.2).bfloat16()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(path)
    return path


def reference(path: Path, scheme: str = "bf16") -> PreTrainedModel:
    """Return the dense checkpoint at ``path`` in float32, with inputs quantized as ``scheme`` does."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    quantizer = quantize_inputs(model, scheme)
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3:
            module.forward = _forward_of(module, quantizer or (lambda x: x))
    return model


def _forward_of(experts: Any, quantized: Callable[[Tensor], Tensor]) -> Any:
    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token, (ids, shares) in enumerate(zip(chosen.tolist(), weights, strict=True)):
            for expert, share in zip(ids, shares, strict=True):
                gate, up = linear(quantized(x[token : token + 1]), experts.gate_up_proj[expert]).chunk(2, dim=-1)
                out[token] += share * linear(quantized(experts.act_fn(gate) * up), experts.down_proj[expert])[0]
        return out

    return forward


def save_native(path: Path, kind: str, scheme: str) -> Stored:
    """Write a random mixture in the native format; the reference has its dequantized weights."""
    dense = save_dense(path / "dense", kind)
    state = load_file(dense / "model.safetensors")
    linears = [name for name, tensor in state.items() if is_linear(name, tensor)]
    written = {name: tensor for name, tensor in state.items() if name not in linears}
    group_size = -1
    for name in linears:
        weight = quantize_at_load(Sparse24Weight.from_dense(state[name], SCHEMES["bf16"]), SCHEMES[scheme], name)
        if weight.scales is not None:
            weight = replace(weight, scales=weight.scales.bfloat16().float())
        group_size = weight.group_size
        tensors = Sparse24Format(SCHEMES[scheme], group_size=group_size).from_weight(weight)
        written |= {f"{name.removesuffix('weight')}{key}": tensor for key, tensor in tensors.items()}
        state[name] = weight.to_dense()
    save_file({name: tensor.float() for name, tensor in state.items()}, dense / "model.safetensors", {"format": "pt"})
    model = reference(dense, scheme)
    fmt = Sparse24Format(SCHEMES[scheme], group_size=group_size, ignore=("lm_head", "re:.*\\.gate$"))
    config = model.config.to_dict() | {"dtype": "bfloat16", "quantization_config": fmt.to_config()}
    with CheckpointWriter(path / "native") as writer:
        for name, tensor in written.items():
            writer.add(name, tensor)
        writer.write_json("config.json", config)
    save_tokenizer(path / "native")
    return Stored(path / "native", model)
