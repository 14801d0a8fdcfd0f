"""How good a checkpoint is: its negative log likelihood on given tokens, in plain torch and float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_sparse.compress.experts import renamed, take_apart
from vllm_sparse.compress.grid import round_codes
from vllm_sparse.compress.output import read_dense
from vllm_sparse.errors import FormatError, NotSparseError
from vllm_sparse.formats import Format, detect
from vllm_sparse.formats.checkpoint import Checkpoint
from vllm_sparse.formats.compressed_tensors import CompressedTensorsFormat
from vllm_sparse.formats.embedding import dequantize_rows
from vllm_sparse.scheme import Scheme


def load_dense(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Return the model in ``path``, dense or in a format of ours, with dequantized float32 weights.

    Layers of a scheme that quantizes activations round their inputs as the kernels do.

    Raises:
        FormatError: the checkpoint is broken or in another format.
    """
    checkpoint = Checkpoint(path)
    config = AutoConfig.from_pretrained(path)
    quantization = checkpoint.config.get("quantization_config")
    form = detect(quantization) if quantization else None
    if quantization and form is None:
        raise FormatError(f"{path}: quantization method {quantization.get('quant_method')!r} cannot be evaluated here")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    parts = take_apart(model, str(path))
    model.requires_grad_(False)
    modules: dict[str, dict[str, str]] = {}
    for key in checkpoint.tensors:
        module_name, _, last = renamed(key, config.model_type).rpartition(".")
        modules.setdefault(module_name, {})[last] = key
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        own = modules.get(name, {})
        stored_as = next(iter(own.values()), "").rpartition(".")[0]
        if form is not None and stored_as in form.embeddings and own:
            tensors = {last: checkpoint.load(key) for last, key in own.items()}
            state[f"{name}.weight"] = dequantize_rows(tensors["weight"], tensors["weight_scale"], torch.float32)
            continue
        scheme = form.scheme_of(stored_as) if form is not None and isinstance(module, nn.Linear) else None
        if form is not None and scheme is not None and own:
            tensors = {last: checkpoint.load(key) for last, key in own.items()}
            input_scale = tensors.get("input_scale")
            state[f"{name}.weight"] = _dense_of(form, stored_as, tensors)
            own = {last: key for last, key in own.items() if last == "bias"}
            if scheme.activation is not None:
                module.register_forward_pre_hook(_round_input(scheme, input_scale))
        state |= {f"{name}.{last}" if name else last: checkpoint.load(key).float() for last, key in own.items()}
    for name, part in parts.items():
        owner, _, last = part.tensor.rpartition(".")
        if last in modules.get(owner, {}):
            state[name] = checkpoint.load(modules[owner][last])[part.expert, part.rows].float()
    missing = model.load_state_dict(state, strict=False).missing_keys
    head = model.get_output_embeddings()
    for name in missing:
        if not (config.tie_word_embeddings and model.get_submodule(name.rpartition(".")[0]) is head):
            raise FormatError(f"{path}: there is no tensor {name}, which the model needs")
    return model.to(device)


@torch.no_grad()
def negative_log_likelihood(model: nn.Module, tokens: Tensor, batch: int = 4) -> Tensor:
    """Return the mean negative log likelihood per predicted token of every row of ``tokens`` ``[rows, length]``."""
    device = next(model.parameters()).device
    rows = []
    for ids in tokens.to(device).split(batch):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        rows.append(nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1))
    return torch.cat(rows).double().cpu()


def _dense_of(form: Format, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the dequantized weight of a layer, 2:4 or stored dense in another pattern."""
    try:
        return form.to_weight(name, tensors).to_dense()
    except NotSparseError:
        assert isinstance(form, CompressedTensorsFormat)  # no other quantized format may hold another pattern
        group = form.our_group(name)
        assert group.scheme is not None  # else it would not have been asked
        return read_dense(tensors, group.scheme, group.group_size).to_dense()


def _round_input(scheme: Scheme, input_scale: Tensor | None) -> Any:
    """Return a hook that rounds inputs to ``scheme.activation`` codes times one scale, as at run time.

    Args:
        input_scale: of all tokens; None for one for each token.
    """
    largest = 448.0 if scheme.activation == torch.float8_e4m3fn else 127.0

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        scale = args[0].abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest if input_scale is None else input_scale
        return (round_codes(args[0] / scale, scheme) * scale,)

    return hook
