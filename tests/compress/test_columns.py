"""The Triton kernels decide what the eager loops decide. Without a GPU they run in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from tests.compress.test_identities import inputs
from vllm_sparse.compress import descent, gptq, sparsegpt
from vllm_sparse.compress.grid import search_grid
from vllm_sparse.compress.hessian import damp
from vllm_sparse.compress.magnitude import magnitude_mask
from vllm_sparse.scheme import SCHEMES

pytest.importorskip("triton")
OWN = slice(32, 64)  # the columns of the block
SCHEME_SIZES = [("w4a16", 32), ("int8", -1), ("fp8", -1)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def columns():
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("needs a GPU, or Triton's interpreter from the start of the process")
    from vllm_sparse.compress import columns

    return columns


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run here")
def test_all_of_this_file_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when Triton is imported
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "s............ " in result.stdout, result.stdout[-3000:]


def layer(scheme, group_size):
    """Return a weight [40, 96], its mask, H damped and a grid, with the rows no multiple of what a program owns."""
    weight, _, h = inputs(k=96, n=40)
    damped, mask = damp(h.float()), magnitude_mask(weight)
    grid = search_grid(weight.float() * mask, SCHEMES[scheme], group_size, damped.h.diagonal())
    return weight.float(), mask, damped, grid


@pytest.mark.parametrize(("scheme", "group_size"), SCHEME_SIZES)
def test_gptq(columns, scheme, group_size):
    weight, mask, damped, grid = layer(scheme, group_size)
    index = torch.arange(OWN.start, OWN.stop)
    expected, keep = (weight * mask).T[OWN].contiguous(), mask.T[OWN].contiguous()
    found = expected.clone().to(DEVICE)
    factor = damped.factor[OWN, OWN]
    errors = gptq._round_columns(expected, keep, factor, grid, index)
    scales = grid.transposed_scales(index)
    others = columns.gptq_columns(found, keep.to(DEVICE), scales.to(DEVICE), factor.to(DEVICE), grid.scheme)
    assert torch.allclose(found.cpu(), expected, atol=1e-5)
    assert torch.allclose(others.cpu(), errors, atol=1e-5)


@pytest.mark.parametrize(("scheme", "group_size"), SCHEME_SIZES)
def test_descent(columns, scheme, group_size):
    weight, mask, damped, grid = layer(scheme, group_size)
    start = gptq.round_to_nearest(weight * mask, grid)
    gradient = (damped.h @ (weight * mask - start).T)[OWN]
    expected, keep, h = start.T[OWN].contiguous(), mask.T[OWN].contiguous(), damped.h[OWN, OWN]
    found = expected.clone().to(DEVICE)
    change = descent._decide_columns(expected, gradient, keep, h, grid, OWN.start)
    scales = grid.transposed_scales(torch.arange(OWN.start, OWN.stop))
    other = columns.descent_columns(
        found, gradient.to(DEVICE), keep.to(DEVICE), scales.to(DEVICE), h.to(DEVICE), grid.scheme
    )
    assert change.any() and torch.allclose(found.cpu(), expected, atol=1e-5)
    assert torch.allclose(other.cpu(), change, atol=1e-5)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(("scheme", "group_size"), SCHEME_SIZES)
def test_sparsegpt(columns, scheme, group_size, rounds):
    weight, _, damped, grid = layer(scheme, group_size)
    expected, factor = weight.T[OWN].contiguous(), damped.factor[OWN, OWN]
    found = expected.clone().to(DEVICE)
    keep = torch.zeros_like(expected, dtype=torch.bool)
    other = keep.to(DEVICE)
    errors = sparsegpt._prune_columns(expected, keep, factor, grid if rounds else None, OWN.start)
    options = {}
    if rounds:
        scales = grid.transposed_scales(torch.arange(OWN.start, OWN.stop))
        options = {"scales": scales.to(DEVICE), "scheme": grid.scheme}
    found_errors = columns.sparsegpt_columns(found, other, factor.to(DEVICE), **options)
    assert torch.equal(other.cpu(), keep) and torch.allclose(found.cpu(), expected, atol=1e-5)
    assert torch.allclose(found_errors.cpu(), errors, atol=1e-5)
