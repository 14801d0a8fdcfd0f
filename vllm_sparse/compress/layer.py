"""One linear layer from dense to what is stored: mask, least squares, scales, rounding, in this order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vllm_sparse.compress.admm import admm
from vllm_sparse.compress.calibrate import Group
from vllm_sparse.compress.coupled import (
    coupled_error,
    coupled_least_squares,
    damp_outputs,
    round_coupled,
    row_targets,
)
from vllm_sparse.compress.descent import coordinate_descent
from vllm_sparse.compress.gptq import gptq, round_to_nearest
from vllm_sparse.compress.grid import Grid, search_grid
from vllm_sparse.compress.hessian import Damped, damp, energy
from vllm_sparse.compress.least_squares import least_squares, optimum_ratio
from vllm_sparse.compress.magnitude import magnitude_mask, wanda_mask
from vllm_sparse.compress.output import Weight, make_weight
from vllm_sparse.compress.recipe import Recipe
from vllm_sparse.compress.rescale import refit_scales
from vllm_sparse.compress.residual import aimed
from vllm_sparse.compress.sparsegpt import sparsegpt
from vllm_sparse.scheme import Scheme, get_scheme
from vllm_sparse.weight import nonzero_mask

_SWEEPS = 2  # of coordinate descent after GPTQ; what a third gains is in the noise
_MASKS = 2  # times a mask is chosen again for outputs that matter together
_REFITS = 2  # of the scales to the codes, each with a sweep after it


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name, n, k: the layer and its shape.
        error: ||(W - W')X|| / ||WX|| on the calibration inputs of the compressed model; without calibration the same
            with X = 1 (the weights' own relative error). W is what was worked towards: with ``Recipe.residual`` that is
            not the dense weight for a layer that adds to the residual stream.
        optimum_ratio: squared error after least squares over that of the best weights on the same mask, from 16 rows;
            None where least squares did not run, or for all outputs together.
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
        weights: the dense weights or what is worked towards instead, float32 ``[n, k]`` by layer name.
        sparse: the pruned weights of all of them, ``[sum of n, k]``; may be improved on ``mask`` before quantizing.
        mask: bool ``[sum of n, k]``.
        ratios: see ``LayerReport.optimum_ratio``.
        curvature: G of each layer's outputs, positive definite ``[n, n]``, where the recipe asks for it.
    """

    weights: Mapping[str, Tensor]
    sparse: Tensor
    mask: Tensor
    ratios: Mapping[str, float]
    curvature: Mapping[str, Tensor] = field(default_factory=dict)

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


def regroup(pruned: Iterable[Pruned], names: tuple[str, ...]) -> Pruned:
    """Return the layers ``names`` out of ``pruned``; what shares an input may have changed, among experts."""
    places = {name: (one, rows) for one in pruned for name, rows in one.rows() if name in names}
    own = [places[name] for name in names]
    return Pruned(
        weights={name: places[name][0].weights[name] for name in names},
        sparse=torch.cat([one.sparse[rows] for one, rows in own]),
        mask=torch.cat([one.mask[rows] for one, rows in own]),
        ratios={name: one.ratios[name] for name, (one, _) in places.items() if name in one.ratios},
        curvature={name: one.curvature[name] for name, (one, _) in places.items() if name in one.curvature},
    )


class Inputs:
    """What is known of the inputs that some layers share: H damped, or nothing."""

    def __init__(self, group: Group, recipe: Recipe) -> None:
        self.h = group.h
        self.largest = group.largest
        self.tokens = group.tokens
        self.lack = group.lack
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


def prune_layers(
    weights: Mapping[str, Tensor], inputs: Inputs, recipe: Recipe, curvature: Mapping[str, Tensor] | None = None
) -> Pruned:
    """Choose the mask of ``weights`` (float32 ``[n, k]`` by name, one k) and the best weights on it.

    Args:
        curvature: G of the outputs of some of them, see ``output_curvature``; their rows are then solved together.

    Raises:
        NotSparseError: the recipe prunes nothing and a layer is not of its pattern.
    """
    damped = inputs.damped
    if recipe.pruner == "none":
        for name, part in weights.items():  # say which layer, before any rounding could hide what is wrong
            recipe.mask_pattern.check(part, name)
    given = torch.cat(list(weights.values()))
    if damped is not None and inputs.lack is not None:
        ((name, part),) = weights.items()  # none shares its input
        weights = {name: aimed(part, inputs.lack, damped.h, recipe.residual)}
    weight = torch.cat(list(weights.values()))
    if damped is not None and bool(damped.dead.any()):
        weight = weight.masked_fill(damped.dead, 0)
    sparse, mask = _prune(given if recipe.pruner == "none" else weight, inputs.h, damped, recipe)
    pruned = Pruned(weights, sparse, mask, {}, {name: damp_outputs(g) for name, g in (curvature or {}).items()})
    if damped is not None and recipe.squares_iterations:
        pruned.sparse = least_squares(weight, sparse, mask, damped.h, recipe.squares_iterations)
        exact = damped.h.double()
        pruned.ratios = {
            name: optimum_ratio(weight[rows], pruned.sparse[rows], mask[rows], exact)
            for name, rows in pruned.rows()
            if name not in pruned.curvature
        }
        for name, rows in pruned.rows():
            if (g := pruned.curvature.get(name)) is not None:
                own = _couple(weight[rows], pruned.sparse[rows], mask[rows], damped.h, g, recipe)
                pruned.sparse[rows], pruned.mask[rows] = own
    return pruned


def _couple(
    weight: Tensor, sparse: Tensor, mask: Tensor, h: Tensor, g: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Return weights and mask of a layer for outputs that matter together, from those for each output alone."""
    sparse = coupled_least_squares(weight, sparse, mask, h, g)
    for _ in range(_MASKS if recipe.pruner == "admm" else 0):
        start, other = admm(row_targets(weight, sparse, g), h, recipe.mask_pattern.mask)
        new = coupled_least_squares(weight, start, other, h, g)
        if coupled_error(new - weight, h, g) < coupled_error(sparse - weight, h, g):
            sparse, mask = new, other
    return sparse, mask


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
        rounded, grid = _round_coupled(pruned, rounded, damped, grid, recipe)
    return grid.encode(rounded), grid.scales.to(recipe.scale_dtype)


def _round_coupled(pruned: Pruned, rounded: Tensor, damped: Damped, grid: Grid, recipe: Recipe) -> tuple[Tensor, Grid]:
    """Round those layers again whose outputs matter together."""
    scales = grid.scales.clone()
    for name, rows in pruned.rows():
        if (g := pruned.curvature.get(name)) is not None:
            weight = pruned.weights[name].masked_fill(damped.dead, 0)
            own = replace(grid, scales=scales[rows])
            found = round_coupled(weight, rounded[rows], pruned.mask[rows], damped.h, g, own, recipe.scale_dtype)
            rounded[rows], scales[rows] = found[0], found[1].scales
    return rounded, replace(grid, scales=scales)


def _relative_error(weight: Tensor, dense: Tensor, h: Tensor | None) -> float:
    difference = weight - dense
    if h is None:
        return float(difference.norm() / weight.norm().clamp_min(1e-30))
    return float((energy(difference, h).sum() / energy(weight, h).sum().clamp_min(1e-30)).sqrt())
