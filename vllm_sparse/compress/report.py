"""What a compressed model says of itself: report.json for programs, README.md (the model card) for people."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from vllm_sparse.compress.keep_dense import Kept
from vllm_sparse.compress.layer import LayerReport
from vllm_sparse.compress.output import Output
from vllm_sparse.compress.pattern import Pattern
from vllm_sparse.compress.recipe import Recipe
from vllm_sparse.errors import OutputError
from vllm_sparse.weight import nonzero_mask


@dataclass(frozen=True)
class Verification:
    """The written files, read again.

    Attributes:
        layers: how many pruned layers were found.
        groups: groups of the pattern among them (of four, for 2:4); weights where it is a share.
        violations: groups with more non-zeros than the pattern keeps; 0 or the model is not written.
        zeros: share of zeros among their weights.
    """

    layers: int
    groups: int
    violations: int
    zeros: float


@dataclass(frozen=True)
class Report:
    """The result of ``compress``.

    Attributes:
        model: what was compressed.
        recipe: every option, defaults resolved.
        calibration: source, sequences, tokens and a hash of the token ids; None when none was needed.
        layers: one report per compressed layer, in the order of the model.
        dense: linear layers that were left as they are.
        kept: those among them that the recipe's ``keep_dense`` chose, with their scores and what they cost in bytes.
        bytes_before, bytes_after: size of all tensors.
        verification: see ``Verification``.
        seconds: wall time.
        phases: seconds by phase: load, smooth, calibrate (the passes that accumulate H), prune (mask and least
            squares), refine, quantize, share (with other processes), write, propagate, verify.
        peak_device_bytes: the most memory that tensors held on the GPU, by phase; empty on a CPU.
        versions: of this package, torch and transformers.
    """

    model: str
    recipe: Recipe
    calibration: dict[str, Any] | None
    layers: tuple[LayerReport, ...]
    dense: tuple[str, ...]
    kept: tuple[Kept, ...]
    bytes_before: int
    bytes_after: int
    verification: Verification
    seconds: float
    phases: dict[str, float]
    peak_device_bytes: dict[str, int]
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(asdict(self) | {"recipe": self.recipe.to_dict()}, indent=2) + "\n"

    def _cost(self) -> str:
        """Return what the layers cost that a rule kept dense."""
        if not self.kept:
            return ""
        layers = sum(len(kept.layers) for kept in self.kept)
        size = sum(kept.extra_bytes for kept in self.kept) / 1e6
        return f" ({layers} by {self.recipe.keep_dense}, {size:.1f} MB more)"

    def summary(self) -> str:
        """Return two lines for the end of a run."""
        worst = max(self.layers, key=lambda layer: layer.error)
        checked = self.verification
        return (
            f"{len(self.layers)} layers {self.recipe.pattern} {self.recipe.scheme}, "
            f"{len(self.dense)} linear layers dense{self._cost()}; "
            f"{self.bytes_before / 1e6:.1f} MB to {self.bytes_after / 1e6:.1f} MB in {self.seconds:.0f} s; "
            f"largest error {worst.error:.3f} ({worst.name})\n"
            f"verified after writing: {_found(checked, self.recipe.mask_pattern, f' in {checked.layers} layers')}"
        )


def verify(
    directory: Path, output: Output, pattern: Pattern, layers: Iterable[str], device: torch.device | str = "cpu"
) -> Verification:
    """Read every pruned layer from the files in ``directory`` and count the groups that break ``pattern``.

    Raises:
        OutputError: a group has too many non-zeros, fewer weights are zero than the pattern says, or a tensor cannot
            be read back.
    """
    files: dict[str, dict[str, Path]] = defaultdict(dict)  # by layer, then by the last part of a tensor's name
    for file in sorted(directory.glob("*.safetensors")):
        for name in _names(file):
            layer, _, last = name.rpartition(".")
            files[layer][last] = file
    count = weights = violations = zeros = 0
    for layer in layers:
        tensors = {}
        for last, file in files[layer].items():
            if last != "bias":
                with safe_open(file, framework="pt") as handle:
                    tensors[last] = handle.get_tensor(f"{layer}.{last}").to(device)
        dense = output.read(layer, tensors).to_dense_codes()
        count += 1
        weights += dense.numel()
        violations += pattern.violations(dense)
        zeros += dense.numel() - int(nonzero_mask(dense).sum())
    groups = weights // (pattern.size or 1)
    if violations:
        raise OutputError(
            f"{directory}: {violations} of {groups} written groups of {pattern.size} are not {pattern.text}; "
            f"nothing was kept"
        )
    if zeros < int(pattern.pruned * weights):
        raise OutputError(
            f"{directory}: only {zeros} of {weights} written weights are zero, not {pattern.pruned:.1%}; "
            f"nothing was kept"
        )
    return Verification(count, groups, violations, zeros / max(1, weights))


def model_card(report: Report, name: str) -> str:
    """Return README.md for a compressed model called ``name``."""
    front = {
        "base_model": report.model,
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": ["vllm", "sparsity", report.recipe.pattern, "sparse24", report.recipe.scheme],
    }
    checked = report.verification
    recipe = yaml.safe_dump(report.recipe.to_dict(), sort_keys=False).rstrip()
    rows = "\n".join(
        f"| {r.name} | {r.n} x {r.k} | {r.error:.4f} | {_maybe(r.optimum_ratio)} | {_maybe(r.dampening)} "
        f"| {r.tokens} | {r.zeros:.1%} | {r.note} |"
        for r in report.layers
    )
    calibration = "none" if report.calibration is None else ", ".join(f"{k} {v}" for k, v in report.calibration.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).rstrip()}
---
# {name}

`{report.model}` with {len(report.layers)} linear layers pruned to {report.recipe.pattern},
stored as {_stored(report.recipe)}:
{report.bytes_before / 1e6:.1f} MB of tensors became {report.bytes_after / 1e6:.1f} MB.
{len(report.dense)} linear layers stay dense.{_kept(report)}

## Use
```
{_use(report.recipe, name)}
```

## How it was made
`vllm-sparse compress` with this recipe (seeded, so that the same input gives the same weights):
```yaml
{recipe}
```
Calibration: {calibration}. Versions: {", ".join(f"{k} {v}" for k, v in report.versions.items())}.

## Verified
Read back from the written files: {_found(checked, report.recipe.mask_pattern)},
{checked.zeros:.2%} of the weights of these layers are zero.

## Layers
Error is ||(W - W')X|| / ||WX|| on the calibration inputs. Optimum is the squared error after least squares over the
least that the layer's mask allows.

| layer | shape | error | optimum | dampening | tokens | zeros | note |
|---|---|--:|--:|--:|--:|--:|---|
{rows}
"""


def _found(checked: Verification, pattern: Pattern, where: str = "") -> str:
    if not pattern.size:
        return f"{checked.zeros:.2%} of the weights{where} are zero"
    words = {2: "two", 4: "four"}
    size, kept = words.get(pattern.size, str(pattern.size)), words.get(pattern.kept, str(pattern.kept))
    return f"{checked.violations} of {checked.groups} groups of {size}{where} hold more than {kept} non-zeros"


def _stored(recipe: Recipe) -> str:
    if recipe.embeddings != "dense":
        return f"{recipe.scheme}, the embeddings in {recipe.embeddings}"
    return recipe.scheme if recipe.format == "sparse24" else f"{recipe.scheme}, dense with their zeros"


def _kept(report: Report) -> str:
    if not report.kept:
        return ""
    rows = "\n".join(
        f"| {', '.join(kept.layers)} | {kept.score:.4g} | {kept.extra_bytes / 1e6:.2f} |" for kept in report.kept
    )
    rule = report.recipe.keep_dense
    return f" Of these, `{rule}` chose:\n\n| layers | score | MB more |\n|---|--:|--:|\n{rows}\n"


def _use(recipe: Recipe, name: str) -> str:
    if recipe.format == "sparse24":
        return f"pip install vllm-sparse\nvllm serve {name}"
    if not recipe.mask_pattern.two_of_four:
        return f"vllm serve {name}"
    return (
        f"vllm serve {name}  # dense\n"
        f"pip install vllm-sparse\nvllm serve {name} --quantization sparse24  # 2:4, compressed while it is loaded"
    )


def _maybe(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())
