"""One linear layer from dense to ``Sparse24Weight``: mask, least squares, scales, rounding, in this order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.compress.descent import coordinate_descent
from vllm_sparse.compress.gptq import gptq, round_to_nearest
from vllm_sparse.compress.grid import search_grid
from vllm_sparse.compress.hessian import Damped, damp, energy
from vllm_sparse.compress.least_squares import least_squares, optimum_ratio
from vllm_sparse.compress.magnitude import magnitude_mask, wanda_mask
from vllm_sparse.compress.recipe import Recipe
from vllm_sparse.compress.sparsegpt import sparsegpt
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import Sparse24Weight, count_violations, nonzero_mask

# Least squares fits the calibration inputs more closely than OBS does; a tenth of the dampening is where held-out
# error stopped falling on the test model (docs/decisions).
_SQUARES_DAMPENING = 0.1
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


def compress_layer(
    name: str, weight: Tensor, h: Tensor | None, tokens: int, recipe: Recipe, value_dtype: torch.dtype
) -> tuple[Sparse24Weight, Tensor, LayerReport]:
    """Prune and quantize one weight.

    Args:
        weight: float32 ``[n, k]``.
        h: H float32 ``[k, k]`` of its inputs, or None when the recipe needs none or no token reached the layer.
        tokens: how many tokens ``h`` saw.
        value_dtype: bf16 or fp16, for the scheme that does not quantize.

    Returns:
        The hub weight, its dequantized dense form float32 ``[n, k]``, and the report.
    """
    note = ""
    if h is not None and tokens < weight.shape[1]:
        note = f"only {tokens} calibration tokens for {weight.shape[1]} inputs"
    if h is None and recipe.needs_calibration:
        note = "no calibration token reached it: pruned by magnitude, rounded to nearest"
    damped = None if h is None else damp(h, recipe.dampening, name)
    if damped is not None and bool(damped.dead.any()):
        weight = weight.masked_fill(damped.dead, 0)
    if damped is not None and damped.dampening > recipe.dampening:
        note = f"dampening raised to {damped.dampening:g}" + (f"; {note}" if note else "")
    sparse, mask, ratio = _prune(weight, h, damped, recipe)
    hub = _quantize(name, weight, sparse, mask, damped, recipe, value_dtype)
    dense = hub.to_dense()
    error = _relative_error(weight, dense, h)
    zeros = 1 - float(nonzero_mask(hub.values).sum()) / weight.numel()
    dampening = None if damped is None else damped.dampening
    report = LayerReport(name, weight.shape[0], weight.shape[1], error, ratio, dampening, tokens, zeros, note)
    return hub, dense, report


def _prune(
    weight: Tensor, h: Tensor | None, damped: Damped | None, recipe: Recipe
) -> tuple[Tensor, Tensor, float | None]:
    """Return the pruned weight, its mask and how far it is from the best weights on that mask."""
    if recipe.pruner == "none":
        return weight, nonzero_mask(weight), None
    if h is None or damped is None or recipe.pruner == "magnitude":
        mask = magnitude_mask(weight)
        sparse = weight * mask
    elif recipe.pruner == "wanda":
        mask = wanda_mask(weight, h)
        sparse = weight * mask
    else:
        sparse, mask = sparsegpt(weight, damped.factor)
    if damped is None or not recipe.squares_iterations:
        return sparse, mask, None
    milder = damp(h, damped.dampening * _SQUARES_DAMPENING).h if h is not None else damped.h
    sparse = least_squares(weight, sparse, mask, milder, recipe.squares_iterations)
    return sparse, mask, optimum_ratio(weight, sparse, mask, milder)


def _quantize(
    name: str,
    weight: Tensor,
    sparse: Tensor,
    mask: Tensor,
    damped: Damped | None,
    recipe: Recipe,
    value_dtype: torch.dtype,
) -> Sparse24Weight:
    scheme = get_scheme(recipe.scheme)
    if not scheme.scaled:
        return Sparse24Weight.from_dense(sparse.to(value_dtype), scheme, layer=name)
    if recipe.pruner == "none" and count_violations(sparse):  # say so before any rounding could hide it
        Sparse24Weight.from_dense(sparse.to(value_dtype), get_scheme("bf16"), layer=name)
    importance = None if damped is None else damped.h.diagonal()
    grid = search_grid(sparse, scheme, recipe.group, importance, recipe.scale_dtype)
    if damped is None or recipe.quantizer == "rtn":
        rounded = round_to_nearest(sparse, grid)
    elif recipe.quantizer == "joint":
        rounded, _ = sparsegpt(weight, damped.factor, grid)
    else:
        rounded = gptq(sparse, damped.h, grid, mask)
        rounded = coordinate_descent(sparse, rounded, damped.h, grid, mask, _SWEEPS)
    scales = grid.scales.to(recipe.scale_dtype)
    return Sparse24Weight.from_dense(grid.encode(rounded), scheme, scales, recipe.group, layer=name)


def _relative_error(weight: Tensor, dense: Tensor, h: Tensor | None) -> float:
    difference = weight - dense
    if h is None:
        return float(difference.norm() / weight.norm().clamp_min(1e-30))
    return float((energy(difference, h).sum() / energy(weight, h).sum().clamp_min(1e-30)).sqrt())
