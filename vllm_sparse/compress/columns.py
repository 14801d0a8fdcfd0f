"""The column loops of gptq, descent and sparsegpt on a GPU: one Triton kernel for a block of columns.

A column depends on those before it, so that eager code launches a dozen kernels per column. Here one warp owns 32 rows
of the weight and keeps what they pass on from column to column in registers. Every array is transposed: column j of the
weight is row j, and its rows are contiguous.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_sparse.scheme import Scheme

BLOCK = 64  # columns per launch: what a warp carries of them has to fit into its registers
_ROWS = 32
_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, halves to even


@triton.jit
def _on_grid(x, scale, max_code, fp8: tl.constexpr):
    code = x / scale
    if fp8:  # e4m3: three bits after the leading one, and no exponent below -6
        code = tl.minimum(tl.maximum(code, -max_code), max_code)
        leading = (code.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(leading, 0.015625) * 0.125
        code = ((code / step + _HALF_EVEN) - _HALF_EVEN) * step
    else:
        code = tl.minimum(tl.maximum((code + _HALF_EVEN) - _HALF_EVEN, -max_code - 1), max_code)
    return code * scale


@triton.jit
def _passed_on(factor, carried, i, j, count):
    """What columns before j leave to it: the sum over i of factor[j, i] times what column i passes on."""
    return tl.sum(tl.load(factor + j * count + i, mask=i < count, other=0.0)[:, None] * carried, 0)


@triton.jit
def _gptq_kernel(
    w, keep, scales, factor, errors, n, count, max_code, fp8: tl.constexpr, b: tl.constexpr, r: tl.constexpr
):
    rows = tl.program_id(0) * r + tl.arange(0, r)
    inside = rows < n
    i = tl.arange(0, b)
    carried = tl.zeros((b, r), tl.float32)
    for j in range(count):
        at = j * n + rows
        x = tl.load(w + at, mask=inside, other=0.0) - _passed_on(factor, carried, i, j, count)
        target = _on_grid(x, tl.load(scales + at, mask=inside, other=1.0), max_code, fp8)
        target = tl.where(tl.load(keep + at, mask=inside, other=0) != 0, target, 0.0)
        error = (x - target) / tl.load(factor + j * count + j)
        tl.store(w + at, target, mask=inside)
        tl.store(errors + at, error, mask=inside)
        carried = tl.where(i[:, None] == j, error[None, :], carried)


@triton.jit
def _descent_kernel(
    q, gradient, keep, scales, h, change, n, count, max_code, fp8: tl.constexpr, b: tl.constexpr, r: tl.constexpr
):
    rows = tl.program_id(0) * r + tl.arange(0, r)
    inside = rows < n
    i = tl.arange(0, b)
    carried = tl.zeros((b, r), tl.float32)
    for j in range(count):
        at = j * n + rows
        slope = tl.load(gradient + at, mask=inside, other=0.0) - _passed_on(h, carried, i, j, count)
        old = tl.load(q + at, mask=inside, other=0.0)
        best = old + slope / tl.load(h + j * count + j)
        best = _on_grid(best, tl.load(scales + at, mask=inside, other=1.0), max_code, fp8)
        best = tl.where(tl.load(keep + at, mask=inside, other=0) != 0, best, 0.0)
        tl.store(q + at, best, mask=inside)
        tl.store(change + at, best - old, mask=inside)
        carried = tl.where(i[:, None] == j, (best - old)[None, :], carried)


@triton.jit
def _sparsegpt_kernel(
    w, keep, scales, factor, errors, n, count, max_code,
    rounds: tl.constexpr, fp8: tl.constexpr, b: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * r + tl.arange(0, r)
    inside = rows < n
    i = tl.arange(0, b)
    carried = tl.zeros((b, r), tl.float32)
    for group in range(count // 4):
        j = group * 4
        # What is left of each of the four after the columns before them, over the cost of losing it.
        x0 = tl.load(w + j * n + rows, mask=inside, other=0.0) - _passed_on(factor, carried, i, j, count)
        x1 = tl.load(w + (j + 1) * n + rows, mask=inside, other=0.0) - _passed_on(factor, carried, i, j + 1, count)
        x2 = tl.load(w + (j + 2) * n + rows, mask=inside, other=0.0) - _passed_on(factor, carried, i, j + 2, count)
        x3 = tl.load(w + (j + 3) * n + rows, mask=inside, other=0.0) - _passed_on(factor, carried, i, j + 3, count)
        s0 = tl.abs(x0 / tl.load(factor + j * count + j))
        s1 = tl.abs(x1 / tl.load(factor + (j + 1) * count + j + 1))
        s2 = tl.abs(x2 / tl.load(factor + (j + 2) * count + j + 2))
        s3 = tl.abs(x3 / tl.load(factor + (j + 3) * count + j + 3))
        wins0 = (s0 >= s1).to(tl.int32) + (s0 >= s2).to(tl.int32) + (s0 >= s3).to(tl.int32)
        wins1 = (s1 > s0).to(tl.int32) + (s1 >= s2).to(tl.int32) + (s1 >= s3).to(tl.int32)
        wins2 = (s2 > s0).to(tl.int32) + (s2 > s1).to(tl.int32) + (s2 >= s3).to(tl.int32)
        wins3 = (s3 > s0).to(tl.int32) + (s3 > s1).to(tl.int32) + (s3 > s2).to(tl.int32)
        for c in tl.static_range(4):
            column = j + c
            at = column * n + rows
            wins = wins0 if c == 0 else (wins1 if c == 1 else (wins2 if c == 2 else wins3))
            x = tl.load(w + at, mask=inside, other=0.0) - _passed_on(factor, carried, i, column, count)
            target = tl.where(wins >= 2, x, 0.0)
            if rounds:
                target = _on_grid(target, tl.load(scales + at, mask=inside, other=1.0), max_code, fp8)
            error = (x - target) / tl.load(factor + column * count + column)
            tl.store(keep + at, (wins >= 2).to(tl.uint8), mask=inside)
            tl.store(w + at, target, mask=inside)
            tl.store(errors + at, error, mask=inside)
            carried = tl.where(i[:, None] == column, error[None, :], carried)


def gptq_columns(w: Tensor, keep: Tensor, scales: Tensor, factor: Tensor, scheme: Scheme) -> Tensor:
    """Round the columns of a block in turn, each after the errors of those before it.

    Args:
        w: float32 ``[count, n]``, count at most ``BLOCK``; becomes the rounded block.
        keep: bool ``[count, n]``.
        scales: float32 ``[count, n]``.
        factor: the block of ``Damped.factor``, upper triangular ``[count, count]``.

    Returns:
        The error that every column passes on to those after it, ``[count, n]``.
    """
    errors = torch.empty_like(w)
    _launch(_gptq_kernel, w, (keep.view(torch.uint8), scales, factor.T.contiguous(), errors), _rounding(scheme))
    return errors


def descent_columns(q: Tensor, gradient: Tensor, keep: Tensor, scales: Tensor, h: Tensor, scheme: Scheme) -> Tensor:
    """Decide the columns of a block again in turn; return their changes, float32 ``[count, n]``.

    Args:
        q: float32 ``[count, n]``, on the grid; becomes the improved block.
        gradient: of the block before any change, ``[count, n]``.
        keep: bool ``[count, n]``.
        scales: float32 ``[count, n]``.
        h: the block of H, ``[count, count]``.
    """
    change = torch.empty_like(q)
    _launch(_descent_kernel, q, (gradient, keep.view(torch.uint8), scales, h.contiguous(), change), _rounding(scheme))
    return change


def sparsegpt_columns(
    w: Tensor, keep: Tensor, factor: Tensor, scales: Tensor | None = None, scheme: Scheme | None = None
) -> Tensor:
    """Choose the mask of a block and prune it column by column; return the errors passed on, ``[count, n]``.

    Args:
        w: float32 ``[count, n]``, count a multiple of 4; becomes the pruned block.
        keep: bool ``[count, n]``, to be filled.
        factor: the block of ``Damped.factor``, ``[count, count]``.
        scales, scheme: the grid that kept weights are rounded to, if any.
    """
    errors = torch.empty_like(w)
    options = {"rounds": False, "max_code": 0.0, "fp8": False}
    if scales is not None and scheme is not None:
        options = {"rounds": True} | _rounding(scheme)
    others = (keep.view(torch.uint8), w if scales is None else scales, factor.T.contiguous(), errors)
    _launch(_sparsegpt_kernel, w, others, options)
    return errors


def _rounding(scheme: Scheme) -> dict[str, float | bool]:
    return {"max_code": scheme.max_code, "fp8": scheme.value_dtypes[0] == torch.float8_e4m3fn}


def _launch(kernel: object, block: Tensor, others: tuple[Tensor, ...], options: dict[str, float | bool]) -> None:
    count, n = block.shape
    grid = (triton.cdiv(n, _ROWS),)
    kernel[grid](block, *others, n, count, **options, b=BLOCK, r=_ROWS, num_warps=1)  # type: ignore[index]
