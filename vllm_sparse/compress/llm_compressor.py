"""Recipes of llm-compressor (YAML with stages of modifiers), read as options of ``Recipe``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_sparse.compress.pattern import Pattern
from vllm_sparse.errors import OptionError
from vllm_sparse.formats.compressed_tensors import read_groups

_PRUNERS = {
    "SparseGPTModifier": "sparsegpt",
    "WandaPruningModifier": "wanda",
    "MagnitudePruningModifier": "magnitude",
}
_QUANTIZERS = {"GPTQModifier": "gptq", "QuantizationModifier": "rtn"}
_SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"scheme": "w4a16"},
    "W8A16": {"scheme": "w8a16"},
    "W8A8": {"scheme": "int8"},
    "INT8": {"scheme": "int8"},
    "FP8": {"scheme": "fp8", "activation": "static"},
    "FP8_DYNAMIC": {"scheme": "fp8"},
}
# Settings that decide speed or memory, or that have one meaning here.
_UNUSED = {
    "actorder", "block_size", "end", "observer", "offload_hessians", "preserve_sparsity_mask", "sequential_targets",
    "sequential_update", "start", "targets",
}  # fmt: skip
_PRUNING = {"mask_structure", "sparsity", "final_sparsity", "init_sparsity", "dampening_frac", "ignore"}
_QUANTIZING = {"scheme", "config_groups", "dampening_frac", "ignore"}
# Which norm comes before which layers is seen in the forward pass.
_SMOOTHING = {"smoothing_strength", "mappings", "num_calibration_steps"}


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
        if name == "ConstantPruningModifier":  # keeps a mask, which happens here anyway
            continue
        if name in _PRUNERS:
            known, own = _PRUNING, {"pruner": _PRUNERS[name]} | _pattern(settings, name, where)
        elif name in _QUANTIZERS:
            known, own = _QUANTIZING, {"quantizer": _QUANTIZERS[name]} | _scheme(settings, name, where)
        elif name == "SmoothQuantModifier":
            known, own = _SMOOTHING, {"smooth": settings.get("smoothing_strength", 0.5)}
        else:
            raise OptionError(f"{where}: modifier {name} has no equivalent here")
        for key in settings:
            if key not in _UNUSED | known:
                raise OptionError(f"{where}: setting {key} of {name} has no equivalent here")
        _check_targets(settings, name, where)
        options |= own
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


def _check_targets(settings: Mapping[str, Any], name: str, where: str) -> None:
    if settings.get("targets", "Linear") not in ("Linear", ["Linear"]):
        raise OptionError(f"{where}: targets of {name} must be Linear; use ignore to leave layers out")


def _pattern(settings: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return the options for the pattern of a pruning modifier, which is 2:4 if nothing else is said."""
    structure = str(settings.get("mask_structure", "0:0")).replace("unstructured", "0:0")
    sparsity = settings.get("sparsity", settings.get("final_sparsity"))
    found = re.fullmatch(r"(\d+):(\d+)", structure)
    if found is None or not (sparsity is None or isinstance(sparsity, float)):
        raise OptionError(
            f"{where}: {name} asks for mask_structure {structure} and sparsity {sparsity!r}, not N:M or a number"
        )
    pruned, size = int(found[1]), int(found[2])
    if not size:
        pattern = "2:4" if sparsity is None else f"{sparsity:g}"
    else:  # theirs says how many of a group are pruned, ours how many are kept
        pattern = f"{size - pruned}:{size}"
        if sparsity not in (None, pruned / size):
            raise OptionError(
                f"{where}: mask_structure {structure} of {name} is a sparsity of {pruned / size}, not {sparsity}"
            )
    try:
        dense = not Pattern.parse(pattern).two_of_four
    except OptionError as error:
        raise OptionError(f"{where}: {name}: {error}") from error
    return {"pattern": pattern} | ({"format": "dense"} if dense else {})


def _scheme(settings: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return the options for what a quantizing modifier makes: a preset by its name, or one group of settings."""
    scheme, groups = settings.get("scheme"), settings.get("config_groups")
    if isinstance(scheme, Mapping) and len(scheme) == 1:
        scheme, targets = next(iter(scheme.items()))
        _check_targets({"targets": targets}, name, where)
    if groups is None:
        if str(scheme).upper() not in _SCHEMES:
            raise OptionError(f"{where}: scheme {scheme!r} of {name} is none of {', '.join(_SCHEMES)}")
        return _SCHEMES[str(scheme).upper()]
    found = read_groups({"config_groups": groups})
    if len(found) != 1:
        raise OptionError(f"{where}: config_groups of {name} must be one group, got {len(found)}")
    group = found[0]
    _check_targets({"targets": list(group.targets)}, name, where)
    if group.scheme is None or not group.symmetric:
        raise OptionError(f"{where}: config_groups of {name} ask for a quantization that none of the schemes here is")
    return {
        "scheme": group.scheme.name,
        "group_size": group.group_size,
        "activation": "static" if group.static_input else "dynamic",
    }
