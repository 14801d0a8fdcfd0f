"""Experts that a model holds in one tensor per projection, taken apart into linear layers of their own.

transformers 5 builds ``gate_up_proj`` ``[experts, 2 * size, hidden]`` and ``down_proj`` ``[experts, hidden, size]``.
Most checkpoints have a weight for each expert instead, and vLLM loads those.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_sparse.errors import UnsupportedError

_PACKED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Part:
    """Where an expert's weight is in a packed tensor: ``tensor[expert, rows]``."""

    tensor: str
    expert: int
    rows: slice


class LinearExperts(nn.ModuleList):
    """The experts of one layer, each of three linear layers; stands in for the module with packed tensors.

    Args:
        packed: what it replaces.
        names: of the gate, up and down projection, as checkpoints call them.
    """

    def __init__(self, packed: Any, names: tuple[str, str, str]) -> None:
        count, hidden, size = packed.down_proj.shape
        super().__init__()
        self._names = names
        self._gate = packed._apply_gate
        for _ in range(count):
            shapes = ((hidden, size), (hidden, size), (size, hidden))
            linears = (nn.Linear(*shape, bias=False, device=packed.down_proj.device) for shape in shapes)
            self.append(nn.ModuleDict(dict(zip(names, linears, strict=True))))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: which experts see a token, ``[tokens, chosen]``.
            top_k_weights: the share of each, ``[tokens, chosen]``.
        """
        result = torch.zeros_like(hidden_states)
        gate, up, down = self._names
        for number in top_k_index.unique().tolist():
            if number >= len(self):  # a place that another process fills
                continue
            token, place = (top_k_index == number).nonzero(as_tuple=True)
            expert: Any = self[number]
            x = hidden_states[token]
            middle = self._gate(torch.cat((expert[gate](x), expert[up](x)), -1))
            share = top_k_weights[token, place, None]
            result.index_add_(0, token, (expert[down](middle) * share).to(result.dtype))
        return result

    def parts(self, prefix: str) -> dict[str, Part]:
        """Return where the weights of these experts are in packed tensors, by parameter name.

        Args:
            prefix: name of this module in the model.
        """
        gate, up, down = self._names
        found = {}
        for number, expert in enumerate(self):
            size = expert[down].in_features  # type: ignore[index]
            start = f"{prefix}.{number}."
            found[f"{start}{gate}.weight"] = Part(f"{prefix}.{_PACKED[0]}", number, slice(0, size))
            found[f"{start}{up}.weight"] = Part(f"{prefix}.{_PACKED[0]}", number, slice(size, 2 * size))
            found[f"{start}{down}.weight"] = Part(f"{prefix}.{_PACKED[1]}", number, slice(None))
        return found


def take_apart(model: nn.Module, path: str) -> dict[str, Part]:
    """Replace every packed experts module of ``model``; return ``LinearExperts.parts`` of all.

    Raises:
        UnsupportedError: experts with biases, transposed or interleaved weights, or without a gate.
    """
    parts: dict[str, Part] = {}
    for name, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        if not any(parameter.dim() == 3 for parameter in own.values()) or not any(key in own for key in _PACKED):
            continue
        if not _is_plain(module, own):
            raise UnsupportedError(
                f"{path}: {name} holds all experts in one tensor, with biases or in a layout that cannot be compressed"
            )
        experts = LinearExperts(module, _projection_names(getattr(model.config, "model_type", "")))  # type: ignore[arg-type]
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, experts)
        parts |= experts.parts(name)
    return parts


def _is_plain(module: Any, own: Mapping[str, Tensor]) -> bool:
    flags = {"has_gate": True, "is_concatenated": True, "has_bias": False, "is_transposed": False}
    if set(own) != set(_PACKED) or any(getattr(module, flag, None) is not value for flag, value in flags.items()):
        return False
    gate_up, down = (own[key].shape for key in _PACKED)
    return gate_up == (down[0], 2 * down[2], down[1])


def _projection_names(model_type: str) -> tuple[str, str, str]:
    """Return what checkpoints of ``model_type`` call an expert's gate, up and down projection."""
    found = {}
    for entry in _conversions(model_type):
        targets = _strings(entry.target_patterns)
        for key in _PACKED:
            if len(targets) == 1 and targets[0].endswith(f"experts.{key}"):
                found[key] = [
                    source.removesuffix(".weight").rpartition(".")[2] for source in _strings(entry.source_patterns)
                ]
    if len(found.get(_PACKED[0], ())) == 2 and len(found.get(_PACKED[1], ())) == 1:
        return found[_PACKED[0]][0], found[_PACKED[0]][1], found[_PACKED[1]][0]
    return "gate_proj", "up_proj", "down_proj"


def renamed(tensor: str, model_type: str) -> str:
    """Return what transformers calls a ``tensor`` of a checkpoint, taking apart nothing."""
    for entry in _conversions(model_type):
        if type(entry).__name__ == "WeightRenaming":
            for source, target in zip(_strings(entry.source_patterns), _strings(entry.target_patterns), strict=False):
                tensor = re.sub(source, target, tensor, count=1)
    return tensor


@functools.cache
def _conversions(model_type: str) -> Sequence[Any]:
    """Return how transformers turns checkpoints of ``model_type`` into its own modules; nothing before version 5."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return ()
    return get_checkpoint_conversion_mapping(model_type) or ()


def _strings(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
