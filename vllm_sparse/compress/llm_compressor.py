"""Recipes of llm-compressor (YAML with stages of modifiers), read as options of ``Recipe``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_sparse.errors import OptionError

_PRUNERS = {
    "SparseGPTModifier": "sparsegpt",
    "WandaPruningModifier": "wanda",
    "MagnitudePruningModifier": "magnitude",
    "ConstantPruningModifier": None,  # keeps a mask, which happens here anyway
}
_QUANTIZERS = {"GPTQModifier": "gptq", "QuantizationModifier": "rtn"}
_SCHEMES = {"W4A16": "w4a16", "W8A16": "w8a16", "W8A8": "int8", "INT8": "int8", "FP8_DYNAMIC": "fp8"}
# Settings that decide speed or memory, or that have one meaning here.
_UNUSED = {
    "actorder", "block_size", "end", "mask_structure", "observer", "offload_hessians", "preserve_sparsity_mask",
    "sequential_targets", "sequential_update", "sparsity", "start", "targets",
}  # fmt: skip


def is_llm_compressor(recipe: Mapping[str, Any]) -> bool:
    """Return whether a parsed YAML recipe holds modifiers instead of options."""
    return any(str(key).endswith(("_stage", "_modifiers", "Modifier")) for key in recipe)


def convert_recipe(recipe: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options that give what ``recipe`` asks for; ``where`` (a file name) starts the messages.

    Raises:
        OptionError: a modifier, scheme, pattern or setting that has no equivalent here.
    """
    options: dict[str, Any] = {"scheme": "bf16", "pruner": "none", "iterations": 0}
    ignore: list[str] = []
    for name, settings in _modifiers(recipe):
        for key in settings:
            if key not in _UNUSED | {"dampening_frac", "ignore", "scheme"}:
                raise OptionError(f"{where}: setting {key} of {name} has no equivalent here")
        if settings.get("targets", "Linear") not in ("Linear", ["Linear"]):
            raise OptionError(f"{where}: targets of {name} must be Linear; use ignore to leave layers out")
        if name in _PRUNERS:
            _check_pattern(settings, name, where)
            options["pruner"] = _PRUNERS[name] or options["pruner"]
        elif name in _QUANTIZERS:
            scheme = settings.get("scheme")
            if scheme not in _SCHEMES:
                raise OptionError(f"{where}: scheme {scheme!r} of {name} is none of {', '.join(_SCHEMES)}")
            options |= {"scheme": _SCHEMES[scheme], "quantizer": _QUANTIZERS[name]}
        else:
            raise OptionError(f"{where}: modifier {name} has no equivalent here")
        if "dampening_frac" in settings:
            options["dampening"] = settings["dampening_frac"]
        listed = settings.get("ignore", [])
        ignore += [entry for entry in ([listed] if isinstance(listed, str) else listed) if entry not in ignore]
    return options | {"ignore": ignore}


def _modifiers(node: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield modifiers in order, through stages and groups."""
    for key, value in node.items():
        if str(key).endswith("Modifier"):
            yield str(key), value or {}
        elif isinstance(value, Mapping):
            yield from _modifiers(value)


def _check_pattern(settings: Mapping[str, Any], name: str, where: str) -> None:
    if settings.get("mask_structure", "2:4") != "2:4" or settings.get("sparsity", 0.5) != 0.5:
        raise OptionError(f"{where}: {name} must ask for sparsity 0.5 and mask_structure 2:4, the pattern made here")
