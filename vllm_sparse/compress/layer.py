"""One linear layer from dense to what is stored: mask, least squares, scales, rounding, in this order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.compress.admm import admm
from vllm_sparse.compress.calibrate import Group
from vllm_sparse.compress.descent import coordinate_descent
from vllm_sparse.compress.gptq import gptq, round_to_nearest
from vllm_sparse.compress.grid import search_grid
from vllm_sparse.compress.hessian import Damped, damp, energy
from vllm_sparse.compress.least_squares import least_squares, optimum_ratio
from vllm_sparse.compress.magnitude import magnitude_mask, wanda_mask
from vllm_sparse.compress.output import Weight, make_weight
from vllm_sparse.compress.recipe import Recipe
from vllm_sparse.compress.rescale import refit_scales
from vllm_sparse.compress.sparsegpt import sparsegpt
from vllm_sparse.scheme import Scheme, get_scheme
from vllm_sparse.weight import nonzero_mask

_SWEEPS = 2  # of coordinate descent after GPTQ; what a third gains is in the noise
_REFITS = 2  # of the scales to the codes, each with a sweep after it


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name, n, k: the layer and its shape.
        error: ||(W - W')X|| / ||WX|| on the calibration inputs of the compressed model; without calibration the same
            with X = 1 (the weights' own relative error).
        optimum_ratio: squared error after least squares over that of the best weights on the same mask, from 16 rows;
            None where least squares did not run.
        dampening: share of H's mean diagonal that was added; None without calibration.
        tokens: calibration tokens that reached the layer.
        zeros: share of zero weights in the result.
        note: a sentence when something is unusual, else "".
    """

    name: str
    n: int
    k: int
    error: float
    optimum_ratio: float | None
    dampening: float | None
    tokens: int
    zeros: float
    note: str = ""


@dataclass
class Pruned:
    """Layers with the same input after pruning, their rows one below the other.

    Attributes:
        weights: the dense weights, float32 ``[n, k]`` by layer name.
        sparse: the pruned weights of all of them, ``[sum of n, k]``; may be improved on ``mask`` before quantizing.
        mask: bool ``[sum of n, k]``.
        ratios: see ``LayerReport.optimum_ratio``.
    """

    weights: Mapping[str, Tensor]
    sparse: Tensor
    mask: Tensor
    ratios: Mapping[str, float]

    def rows(self) -> Iterator[tuple[str, slice]]:
        """Yield each layer's name and its rows."""
        start = 0
        for name, weight in self.weights.items():
            yield name, slice(start, start + weight.shape[0])
            start += weight.shape[0]

    @property
    def dense(self) -> Tensor:
        """The dense weights one below the other."""
        return torch.cat(list(self.weights.values()))


class Inputs:
    """What is known of the inputs that some layers share: H damped, or nothing."""

    def __init__(self, group: Group, recipe: Recipe) -> None:
        self.h = group.h
        self.largest = group.largest
        self.tokens = group.tokens
        self.damped = None
        if self.h is not None:
            self.damped = damp(self.h, recipe.dampening, ", ".join(group.names), invert=recipe.pruner == "sparsegpt")

    def input_scale(self, scheme: Scheme) -> Tensor:
        """Return the static scale of activations, float32 ``[1]``: the largest seen becomes the largest code."""
        if self.largest is None or not float(self.largest):
            return torch.ones(1)
        return (self.largest.float() / scheme.max_code).reshape(1)

    def note(self, recipe: Recipe, k: int) -> str:
        """Return what a reader of the report should know, or nothing."""
        if self.damped is None:
            missing = "no calibration token reached it: pruned by magnitude, rounded to nearest"
            return missing if recipe.needs_calibration else ""
        notes = []
        if self.damped.dampening > recipe.dampening:
            notes.append(f"dampening raised to {self.damped.dampening:g}")
        if self.tokens < k:
            notes.append(f"only {self.tokens} calibration tokens for {k} inputs")
        return "; ".join(notes)


def prune_layers(weights: Mapping[str, Tensor], inputs: Inputs, recipe: Recipe) -> Pruned:
    """Choose the mask of ``weights`` (float32 ``[n, k]`` by name, one k) and the best weights on it.

    Raises:
        NotSparseError: the recipe prunes nothing and a layer is not of its pattern.
    """
    damped = inputs.damped
    weight = torch.cat(list(weights.values()))
    if damped is not None and bool(damped.dead.any()):
        weight = weight.masked_fill(damped.dead, 0)
    if recipe.pruner == "none":
        for name, part in weights.items():  # say which layer, before any rounding could hide what is wrong
            recipe.mask_pattern.check(part, name)
    sparse, mask = _prune(weight, inputs.h, damped, recipe)
    pruned = Pruned(weights, sparse, mask, {})
    if damped is not None and recipe.squares_iterations:
        pruned.sparse = least_squares(weight, sparse, mask, damped.h, recipe.squares_iterations)
        exact = damped.h.double()
        pruned.ratios = {
            name: optimum_ratio(weight[rows], pruned.sparse[rows], mask[rows], exact) for name, rows in pruned.rows()
        }
    return pruned


def quantize_layers(
    pruned: Pruned, inputs: Inputs, recipe: Recipe, value_dtype: torch.dtype
) -> Iterator[tuple[Weight, Tensor, LayerReport]]:
    """Round pruned layers to their scheme.

    Args:
        value_dtype: bf16 or fp16, for the scheme that does not quantize.

    Yields:
        For each layer the weight to write, its dequantized dense form float32 ``[n, k]``, and the report.
    """
    codes, scales = _quantize(pruned, inputs.damped, recipe, value_dtype)
    scheme, pattern = get_scheme(recipe.scheme), recipe.mask_pattern
    for name, rows in pruned.rows():
        own_scales = None if scales is None else scales[rows]
        own = make_weight(
            codes[rows], pattern, name, scheme=scheme, scales=own_scales, group_size=recipe.group,
            input_scale=inputs.input_scale(scheme) if recipe.static_input else None,
        )  # fmt: skip
        weight, dense = pruned.weights[name], own.to_dense()
        report = LayerReport(
            name,
            n=weight.shape[0],
            k=weight.shape[1],
            error=_relative_error(weight, dense, inputs.h),
            optimum_ratio=pruned.ratios.get(name),
            dampening=None if inputs.damped is None else inputs.damped.dampening,
            tokens=inputs.tokens,
            zeros=1 - float(nonzero_mask(own.values).sum()) / weight.numel(),
            note=inputs.note(recipe, weight.shape[1]),
        )
        yield own, dense, report


def _prune(weight: Tensor, h: Tensor | None, damped: Damped | None, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return a first pruned weight and its mask."""
    if recipe.pruner == "none":
        return weight, nonzero_mask(weight)
    pattern = recipe.mask_pattern
    if h is None or damped is None or recipe.pruner == "magnitude":
        mask = magnitude_mask(weight, pattern.mask)
    elif recipe.pruner == "wanda":
        mask = wanda_mask(weight, h, pattern.mask)
    elif recipe.pruner == "admm":
        return admm(weight, damped.h, pattern.mask)
    else:
        return sparsegpt(weight, damped.factor, pattern=pattern)
    return weight * mask, mask


def _quantize(
    pruned: Pruned, damped: Damped | None, recipe: Recipe, value_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the stored values ``[n, k]`` and their scales, if the scheme has any."""
    scheme, sparse = get_scheme(recipe.scheme), pruned.sparse
    if not scheme.scaled:
        return sparse.to(value_dtype), None
    importance = None if damped is None else damped.h.diagonal()
    grid = search_grid(sparse, scheme, recipe.group, importance, recipe.scale_dtype)
    if damped is None or recipe.quantizer == "rtn":
        rounded = round_to_nearest(sparse, grid)
    elif recipe.quantizer == "joint":
        rounded, _ = sparsegpt(pruned.dense, damped.factor, grid, pattern=recipe.mask_pattern)
    else:
        rounded = gptq(sparse, damped.h, grid, pruned.mask)
        rounded = coordinate_descent(sparse, rounded, damped.h, grid, pruned.mask, _SWEEPS)
        for _ in range(_REFITS):
            rounded, grid = refit_scales(sparse, rounded, damped.h, grid, recipe.scale_dtype)
            rounded = coordinate_descent(sparse, rounded, damped.h, grid, pruned.mask, 1)
    return grid.encode(rounded), grid.scales.to(recipe.scale_dtype)


def _relative_error(weight: Tensor, dense: Tensor, h: Tensor | None) -> float:
    difference = weight - dense
    if h is None:
        return float(difference.norm() / weight.norm().clamp_min(1e-30))
    return float((energy(difference, h).sum() / energy(weight, h).sum().clamp_min(1e-30)).sqrt())
