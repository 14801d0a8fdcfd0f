"""One linear layer from dense to ``Sparse24Weight``: mask, least squares, scales, rounding, in this order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_sparse.compress.admm import admm
from vllm_sparse.compress.descent import coordinate_descent
from vllm_sparse.compress.gptq import gptq, round_to_nearest
from vllm_sparse.compress.grid import search_grid
from vllm_sparse.compress.hessian import Damped, damp, energy
from vllm_sparse.compress.least_squares import least_squares, optimum_ratio
from vllm_sparse.compress.magnitude import magnitude_mask, wanda_mask
from vllm_sparse.compress.recipe import Recipe
from vllm_sparse.compress.sparsegpt import sparsegpt
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import Sparse24Weight, nonzero_mask

_SWEEPS = 3  # of coordinate descent after GPTQ; what a fourth gains is in the noise


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


def compress_layers(
    weights: Mapping[str, Tensor], h: Tensor | None, tokens: int, recipe: Recipe, value_dtype: torch.dtype
) -> Iterator[tuple[Sparse24Weight, Tensor, LayerReport]]:
    """Prune and quantize the weights of layers that have the same input, all rows at once.

    Args:
        weights: float32 ``[n, k]`` by layer name, of one k.
        h: H float32 ``[k, k]`` of their input, or None when the recipe needs none or no token reached the layers.
        tokens: how many tokens ``h`` saw.
        value_dtype: bf16 or fp16, for the scheme that does not quantize.

    Yields:
        For each layer the hub weight, its dequantized dense form float32 ``[n, k]``, and the report.
    """
    names = ", ".join(weights)
    weight = torch.cat(list(weights.values()))
    damped = None if h is None else damp(h, recipe.dampening, names)
    if damped is not None and bool(damped.dead.any()):
        weight = weight.masked_fill(damped.dead, 0)
    if recipe.pruner == "none":
        for name, part in weights.items():  # name the layer, before any rounding could hide what is wrong
            Sparse24Weight.from_dense(part.to(value_dtype), get_scheme("bf16"), layer=name)
    sparse, mask = _prune(weight, h, damped, recipe)
    if damped is not None and recipe.squares_iterations:
        sparse = least_squares(weight, sparse, mask, damped.h, recipe.squares_iterations)
    hub = _quantize(weight, sparse, mask, damped, recipe, value_dtype)
    start = 0
    for name, part in weights.items():
        rows = slice(start, start + part.shape[0])
        start = rows.stop
        ratio = None
        if damped is not None and recipe.squares_iterations:
            ratio = optimum_ratio(weight[rows], sparse[rows], mask[rows], damped.h)
        own = _rows(hub, rows)
        dense = own.to_dense()
        yield (
            own,
            dense,
            LayerReport(
                name,
                n=part.shape[0],
                k=part.shape[1],
                error=_relative_error(part, dense, h),
                optimum_ratio=ratio,
                dampening=None if damped is None else damped.dampening,
                tokens=tokens,
                zeros=1 - float(nonzero_mask(own.values).sum()) / part.numel(),
                note=_note(damped, tokens, recipe, part.shape[1]),
            ),
        )


def _prune(weight: Tensor, h: Tensor | None, damped: Damped | None, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return a first pruned weight and its mask."""
    if recipe.pruner == "none":
        return weight, nonzero_mask(weight)
    if h is None or damped is None or recipe.pruner == "magnitude":
        mask = magnitude_mask(weight)
    elif recipe.pruner == "wanda":
        mask = wanda_mask(weight, h)
    elif recipe.pruner == "admm":
        return admm(weight, damped.h)
    else:
        return sparsegpt(weight, damped.factor)
    return weight * mask, mask


def _quantize(
    weight: Tensor, sparse: Tensor, mask: Tensor, damped: Damped | None, recipe: Recipe, value_dtype: torch.dtype
) -> Sparse24Weight:
    scheme = get_scheme(recipe.scheme)
    if not scheme.scaled:
        return Sparse24Weight.from_dense(sparse.to(value_dtype), scheme)
    importance = None if damped is None else damped.h.diagonal()
    grid = search_grid(sparse, scheme, recipe.group, importance, recipe.scale_dtype)
    if damped is None or recipe.quantizer == "rtn":
        rounded = round_to_nearest(sparse, grid)
    elif recipe.quantizer == "joint":
        rounded, _ = sparsegpt(weight, damped.factor, grid)
    else:
        rounded = gptq(sparse, damped.h, grid, mask)
        rounded = coordinate_descent(sparse, rounded, damped.h, grid, mask, _SWEEPS)
    return Sparse24Weight.from_dense(grid.encode(rounded), scheme, grid.scales.to(recipe.scale_dtype), recipe.group)


def _rows(hub: Sparse24Weight, rows: slice) -> Sparse24Weight:
    scales = None if hub.scales is None else hub.scales[rows]
    return replace(hub, values=hub.values[rows], positions=hub.positions[rows], scales=scales)


def _note(damped: Damped | None, tokens: int, recipe: Recipe, k: int) -> str:
    """Return what a reader of the report should know of a layer, or nothing."""
    if damped is None:
        missing = "no calibration token reached it: pruned by magnitude, rounded to nearest"
        return missing if recipe.needs_calibration else ""
    notes = []
    if damped.dampening > recipe.dampening:
        notes.append(f"dampening raised to {damped.dampening:g}")
    if tokens < k:
        notes.append(f"only {tokens} calibration tokens for {k} inputs")
    return "; ".join(notes)


def _relative_error(weight: Tensor, dense: Tensor, h: Tensor | None) -> float:
    difference = weight - dense
    if h is None:
        return float(difference.norm() / weight.norm().clamp_min(1e-30))
    return float((energy(difference, h).sum() / energy(weight, h).sum().clamp_min(1e-30)).sqrt())
