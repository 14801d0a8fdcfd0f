"""The second moment of a layer's inputs, H = X^T X / tokens, and the factor of its inverse that OBS walks along."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse import native
from vllm_sparse.compress.products import cholesky, inverse_of_lower, product
from vllm_sparse.errors import FormatError, UnsupportedError

# Columns of H computed at once; panels below the diagonal are mirrored, not computed.
_PANEL = 512
_PANEL_16_BIT = 2048  # tensor cores need larger products to be busy
_DAMPENING_STEP = 10.0
_LARGEST_DAMPENING = 1.0


class Hessian:
    """Accumulates H over the tokens that reach a linear layer. There is no padding among them: see calibration.py.

    Attributes:
        tokens: how many input rows were added.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.tokens = 0
        self._panel = _PANEL
        self._sum = torch.zeros(k, k, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs ``[..., k]``; products are summed in float32. All inputs have one dtype."""
        x = x.reshape(-1, x.shape[-1])
        self.tokens += x.shape[0]
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            self._panel = _PANEL_16_BIT
            for start in range(0, x.shape[1], self._panel):
                stop = start + self._panel
                product = torch.mm(x[:, start:stop].T, x[:, start:], out_dtype=torch.float32)
                self._sum[start:stop, start:] += product
            return
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and native.cpu is not None and native.tier().has_gram:
            self._panel = native.cpu.GRAM_COLUMNS
            x = x if x.stride(1) == 1 else x.contiguous()
            native.cpu.gram(native.tier(), x.data_ptr(), *x.shape, x.stride(0), self._sum.data_ptr())
            return
        x = x.float()
        for start in range(0, x.shape[1], self._panel):
            stop = start + self._panel
            self._sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def matrix(self, layer: str) -> Tensor:
        """Return H float32 ``[k, k]``, the mean over tokens.

        Raises:
            FormatError: the activations held NaN or Inf; ``layer`` is in the message.
        """
        for start in range(self._panel, self._sum.shape[0], self._panel):
            stop = start + self._panel
            self._sum[start:stop, :start] = self._sum[:start, start:stop].T
        h = self._sum / max(1, self.tokens)
        if not bool(torch.isfinite(h).all()):
            raise FormatError(f"{layer}: its inputs overflow or hold NaN during calibration")
        return h


class CrossMoment:
    """Accumulates e x^T over tokens, with x the input of a layer and e something of its outputs' size.

    Args:
        n, k: of e and of x.
    """

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self.sum = torch.zeros(n, k, dtype=torch.float32, device=device)

    def add(self, e: Tensor, x: Tensor) -> None:
        """Add ``[..., n]`` and ``[..., k]`` of the same tokens, rounded to the dtype of ``x``; sums are float32."""
        x = x.reshape(-1, x.shape[-1])
        e = e.reshape(-1, e.shape[-1]).to(x.dtype)
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            self.sum += torch.mm(e.T, x, out_dtype=torch.float32)
        else:
            self.sum += e.T @ x


@dataclass(frozen=True)
class Damped:
    """H made positive definite.

    Attributes:
        h: H with ``dampening`` times its mean diagonal added, float32 ``[k, k]``.
        factor: upper triangular U with U^T U = h^-1 (GPTQ, arXiv 2210.17323, step 3), float32 ``[k, k]``; empty where
            it was not asked for.
        dampening: the share of the mean diagonal that was needed.
        dead: bool ``[k]``, inputs that were always zero. Their weights can be anything, so they become zero.
    """

    h: Tensor
    factor: Tensor
    dampening: float
    dead: Tensor


def damp(h: Tensor, dampening: float = 0.01, layer: str = "layer", invert: bool = True) -> Damped:
    """Add ``dampening`` times the mean diagonal to ``h`` ``[k, k]`` and, with ``invert``, factor its inverse.

    When the result is not positive definite, double precision and then ten times the dampening are tried.

    Raises:
        UnsupportedError: no dampening up to the mean diagonal itself is enough.
    """
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal.mean()) or 1.0
    while dampening <= _LARGEST_DAMPENING:
        damped = h.clone()
        damped.diagonal().add_(dampening * mean)
        # A dead input has an empty row and column; any positive diagonal leaves the others alone.
        damped.diagonal()[dead] = mean
        for dtype in (torch.float32, torch.float64):
            factor = _inverse_factor(damped.to(dtype)) if invert else _nothing_if_definite(damped.to(dtype))
            if factor is not None:
                return Damped(damped, factor.float(), dampening, dead)
        dampening = dampening * _DAMPENING_STEP if dampening else 1e-6
    raise UnsupportedError(f"{layer}: no dampening makes the Hessian positive definite; use more calibration text")


def _inverse_factor(h: Tensor) -> Tensor | None:
    """Return upper U with U^T U = h^-1, or None when ``h`` is not numerically positive definite.

    With its rows and columns in reverse order, h = L L^T; in the right order that is R R^T with R upper, and U = R^-1.
    """
    lower = cholesky(h.flip(0, 1))
    if lower is None:
        return None
    factor = inverse_of_lower(lower).flip(0, 1)
    return factor if bool(torch.isfinite(factor).all()) else None


def _nothing_if_definite(h: Tensor) -> Tensor | None:
    """Return an empty tensor, or None when ``h`` is not numerically positive definite."""
    return None if cholesky(h) is None else h.new_empty(0)


def energy(difference: Tensor, h: Tensor) -> Tensor:
    """Return d h d^T of every row d of ``difference`` ``[n, k]``: the squared output error, ``[n]``."""
    return (product(difference, h) * difference).sum(1).clamp_min(0)
