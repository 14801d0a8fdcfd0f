"""What SparseGPT, GPTQ and least squares must give exactly, or to rounding, in double precision."""

import itertools

import pytest
import torch

from vllm_sparse.compress.descent import coordinate_descent
from vllm_sparse.compress.gptq import gptq, round_to_nearest
from vllm_sparse.compress.grid import round_codes, search_grid
from vllm_sparse.compress.hessian import Hessian, damp, energy
from vllm_sparse.compress.least_squares import least_squares, optimum_ratio
from vllm_sparse.compress.magnitude import magnitude_mask, wanda_mask
from vllm_sparse.compress.pattern import Pattern
from vllm_sparse.compress.rescale import refit_scales
from vllm_sparse.compress.sparsegpt import sparsegpt
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import count_violations

INT4 = SCHEMES["w4a16"]


def inputs(k=64, n=24, tokens=400, seed=0, dtype=torch.float64):
    """Return a weight [n, k], correlated inputs [tokens, k] and their H."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=dtype) / k**0.5 + 0.5 * torch.eye(k, dtype=dtype)
    x = torch.randn(tokens, k, generator=generator, dtype=dtype) @ mix
    return torch.randn(n, k, generator=generator, dtype=dtype), x, x.T @ x / tokens


def damped(h, dampening=0.01):
    """Return the damped H and its inverse factor in the precision of h."""
    h = h + dampening * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    return h, torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def exact_squares(weight, mask, h):
    """Solve the normal equations of every row."""
    best = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        index = kept.nonzero().squeeze(1)
        best[row, index] = torch.linalg.solve(h[index][:, index], h[index] @ weight[row])
    return best


def test_the_damped_factor_inverts_the_hessian():
    _, _, h = inputs()
    result = damp(h.float())
    identity = result.factor.T @ result.factor @ result.h
    assert torch.allclose(identity, torch.eye(64), atol=1e-3)
    assert result.dampening == 0.01 and not result.dead.any()


@pytest.mark.parametrize("block", [4, 8, 32, 256])
def test_sparsegpt_does_not_depend_on_the_block_size(block):
    weight, _, h = inputs()
    _, factor = damped(h)
    expected, expected_mask = sparsegpt(weight, factor, block=64)
    pruned, mask = sparsegpt(weight, factor, block=block)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(pruned, expected, rtol=0, atol=1e-12)


def test_the_output_error_is_the_sum_of_the_column_errors():
    weight, _, h = inputs()
    h, factor = damped(h)
    pruned, _ = sparsegpt(weight, factor)
    # Each column's (w - q)^2 / U_ii^2 as OBS charges it, replayed from the result and the factor alone.
    w, total = weight.clone(), 0.0
    for j in range(w.shape[1]):
        error = (w[:, j] - pruned[:, j]) / factor[j, j]
        w[:, j:] -= error[:, None] * factor[j, j:]
        total += float(error.square().sum())
    assert float(energy(weight - pruned, h).sum()) == pytest.approx(total, rel=1e-10)


def test_equal_inputs_make_sparsegpt_magnitude_pruning():
    weight, _, _ = inputs()
    pruned, mask = sparsegpt(weight, torch.eye(64, dtype=torch.float64))
    assert torch.equal(mask, magnitude_mask(weight))
    assert torch.equal(pruned, weight * mask)


def test_uncorrelated_inputs_make_sparsegpt_wanda():
    weight, _, _ = inputs()
    h = torch.diag(torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.1)
    pruned, mask = sparsegpt(weight, torch.diag(h.diagonal().rsqrt()))
    assert torch.equal(mask, wanda_mask(weight, h))
    assert torch.equal(pruned, weight * mask)


def test_rows_do_not_see_each_other():
    weight, _, h = inputs()
    h, factor = damped(h)
    together, mask = sparsegpt(weight, factor)
    alone, _ = sparsegpt(weight[5:6], factor)
    assert torch.allclose(together[5:6], alone, rtol=0, atol=1e-12)
    solved = least_squares(weight, together, mask, h, 30)
    assert torch.allclose(least_squares(weight[5:6], alone, mask[5:6], h, 30), solved[5:6], atol=1e-10)


def test_the_scale_of_the_inputs_changes_nothing():
    weight, _, h = inputs()
    first, _ = sparsegpt(weight, damped(h)[1])
    second, _ = sparsegpt(weight, damped(h * 64)[1])
    assert torch.allclose(first, second, rtol=0, atol=1e-12)


def test_single_precision_finds_the_same_mask():
    weight, _, h = inputs()
    _, mask = sparsegpt(weight.float(), damp(h.float()).factor)
    _, exact = sparsegpt(weight, damped(h)[1])
    assert (mask == exact).double().mean() > 0.999


def test_least_squares_reaches_the_normal_equations_and_pythagoras_holds():
    weight, _, h = inputs()
    h, factor = damped(h)
    pruned, mask = sparsegpt(weight, factor)
    best = exact_squares(weight, mask, h)
    found = least_squares(weight, pruned, mask, h, 200)
    assert torch.allclose(found, best, atol=1e-9)
    assert ((weight - found) @ h * mask).abs().max() < 1e-8
    assert torch.equal(found[~mask], torch.zeros_like(found[~mask]))
    split = energy(weight - best, h) + energy(pruned - best, h)
    assert torch.allclose(energy(weight - pruned, h), split, rtol=1e-9)


def test_every_iteration_of_least_squares_lowers_the_error():
    weight, _, h = inputs()
    h, factor = damped(h)
    pruned, mask = sparsegpt(weight, factor)
    errors = [float(energy(weight - least_squares(weight, pruned, mask, h, i), h).sum()) for i in range(12)]
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_the_optimum_ratio_is_one_at_the_optimum_and_more_elsewhere():
    weight, _, h = inputs()
    h, factor = damped(h)
    pruned, mask = sparsegpt(weight, factor)
    assert optimum_ratio(weight, exact_squares(weight, mask, h), mask, h) == pytest.approx(1, abs=1e-9)
    assert optimum_ratio(weight, pruned, mask, h) > 1.01


def test_a_tiny_layer_is_close_to_the_best_of_all_masks():
    weight, _, h = inputs(k=8, n=12)
    h, factor = damped(h)
    _, mask = sparsegpt(weight, factor)
    ours = energy(weight - exact_squares(weight, mask, h), h)
    pairs = [[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    every = [torch.tensor(a + b).expand(12, 8) for a in pairs for b in pairs]
    best = torch.stack([energy(weight - exact_squares(weight, m, h), h) for m in every]).amin(0)
    assert (ours >= best - 1e-12).all()
    assert float(ours.sum() / best.sum()) < 1.5  # seen: 1.1; a greedy choice of masks has no better bound


def test_a_pruned_weight_is_a_fixed_point():
    weight, _, h = inputs()
    h, factor = damped(h)
    pruned, mask = sparsegpt(weight, factor)
    again, same = sparsegpt(pruned, factor)
    assert torch.equal(pruned[mask], again[mask]) and torch.equal(mask, same)
    assert torch.allclose(least_squares(pruned, pruned, mask, h, 10), pruned, atol=1e-12)


@pytest.mark.parametrize("scheme", ["w4a16", "int8", "fp8"])
def test_gptq_without_correlation_rounds_to_nearest(scheme):
    weight, _, _ = inputs()
    grid = search_grid(weight.float(), SCHEMES[scheme], -1)
    mask = torch.ones_like(weight, dtype=torch.bool)
    rounded = gptq(weight.float(), torch.eye(64), grid, mask)
    assert torch.equal(rounded, round_to_nearest(weight.float(), grid))


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_keeps_the_mask_and_descent_lowers_its_error(act_order):
    weight, _, h = inputs(k=128, tokens=600)
    result = damp(h.float())
    pruned, mask = sparsegpt(weight.float(), result.factor)
    grid = search_grid(pruned, INT4, 32, result.h.diagonal(), torch.bfloat16)
    errors = [float(energy(pruned - round_to_nearest(pruned, grid), result.h).sum())]
    rounded = gptq(pruned, result.h, grid, mask, act_order)
    for sweeps in range(4):
        found = coordinate_descent(pruned, rounded, result.h, grid, mask, sweeps)
        assert count_violations(found) == 0 and not found[~mask].any()
        assert torch.equal(round_to_nearest(found, grid), found)
        errors.append(float(energy(pruned - found, result.h).sum()))
    assert errors[1] > errors[2] > errors[3] > errors[4]
    assert errors[4] < 0.9 * errors[0]


def test_gptq_of_a_dense_weight_beats_rounding():
    weight, _, h = inputs(k=128, tokens=600)
    h = damp(h.float()).h
    grid = search_grid(weight.float(), INT4, 32, h.diagonal(), torch.bfloat16)
    rounded = gptq(weight.float(), h, grid, torch.ones_like(weight, dtype=torch.bool))
    nearest = round_to_nearest(weight.float(), grid)
    assert energy(weight.float() - rounded, h).sum() < 0.8 * energy(weight.float() - nearest, h).sum()


@pytest.mark.parametrize("block", [1, 7, 64])
def test_descent_does_not_depend_on_the_block_size(block):
    weight, _, h = inputs()
    grid = search_grid(weight, INT4, 32)
    mask = magnitude_mask(weight)
    start = round_to_nearest(weight * mask, grid)
    expected = coordinate_descent(weight, start, h, grid, mask, 2)
    assert torch.equal(coordinate_descent(weight, start, h, grid, mask, 2, block), expected)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_gptq_does_not_depend_on_the_block_size(block):
    weight, _, h = inputs()
    grid = search_grid(weight.float(), INT4, 32)
    mask = torch.ones_like(weight, dtype=torch.bool)
    h = damp(h.float()).h
    assert (gptq(weight.float(), h, grid, mask, block=block) - gptq(weight.float(), h, grid, mask)).abs().mean() < 1e-4


def test_the_joint_mode_without_rounding_is_sparsegpt():
    class Exact:
        def round(self, column, j):
            return column

    weight, _, h = inputs()
    _, factor = damped(h)
    assert torch.equal(sparsegpt(weight, factor, Exact())[0], sparsegpt(weight, factor)[0])


@pytest.mark.parametrize(("scheme", "group_size"), [("w4a16", 32), ("int8", -1)])
def test_the_joint_mode_that_prunes_nothing_is_gptq(scheme, group_size):
    weight, _, h = inputs()
    result = damp(h.float())
    grid = search_grid(weight.float(), SCHEMES[scheme], group_size)
    everything = Pattern("all", kept=4, size=4, pruned=0.0)
    joint, mask = sparsegpt(weight.float(), result.factor, grid, pattern=everything)
    expected = gptq(weight.float(), result.h, grid, torch.ones_like(mask), act_order=False)
    assert mask.all() and float((joint - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_groups_of_four_in_another_order_are_the_layer_in_that_order():
    """Where inputs do not correlate, the order in which groups are decided does not matter either."""
    weight, _, h = inputs()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    columns = (order[:, None] * 4 + torch.arange(4)).flatten()
    h = torch.diag(h.diagonal())
    moved, mask = sparsegpt(weight[:, columns], damped(h[columns][:, columns])[1])
    expected, expected_mask = sparsegpt(weight, damped(h)[1])
    assert torch.equal(mask, expected_mask[:, columns]) and torch.allclose(moved, expected[:, columns], atol=1e-12)


def test_rounding_to_e4m3_is_within_a_sixteenth_and_zeros_stay():
    codes = torch.cat((torch.logspace(-6, 8.8, 500, base=2.0), torch.zeros(1), torch.tensor([-0.0])))
    rounded = round_codes(torch.cat((codes, -codes)), SCHEMES["fp8"])
    assert ((rounded - torch.cat((codes, -codes))).abs() <= codes.abs().repeat(2) / 16).all()
    assert count_violations(torch.tensor([[1.0, -0.0, 2.0, -0.0]])) == 0  # a negative zero is a zero


@pytest.mark.parametrize("scheme", ["w4a16", "int8", "fp8", "w8a16"])
def test_zeros_are_codes_of_every_grid(scheme):
    weight = inputs()[0].float()
    mask = magnitude_mask(weight)
    assert not round_to_nearest(weight * mask, search_grid(weight, SCHEMES[scheme], -1))[~mask].any()


def test_tokens_of_zeros_change_h_by_their_number_alone():
    _, x, _ = inputs(dtype=torch.float32)
    plain, padded = Hessian(64, torch.device("cpu")), Hessian(64, torch.device("cpu"))
    plain.add(x)
    padded.add(torch.cat((x, torch.zeros(400, 64))))
    assert torch.allclose(padded.matrix("layer") * 2, plain.matrix("layer"), rtol=1e-5, atol=1e-5)


def test_the_joint_mode_is_on_the_grid_and_2_4():
    weight, _, h = inputs()
    result = damp(h.float())
    grid = search_grid(weight.float(), INT4, 32)
    rounded, _ = sparsegpt(weight.float(), result.factor, grid)
    assert count_violations(rounded) == 0
    assert torch.equal(round_to_nearest(rounded, grid), rounded)


def test_searched_scales_are_storable_and_no_worse():
    weight = inputs()[0].float()
    plain = search_grid(weight, INT4, 32, None, torch.bfloat16, search=False)
    found = search_grid(weight, INT4, 32, None, torch.bfloat16)
    for grid in (plain, found):
        assert torch.equal(grid.scales, grid.scales.bfloat16().float())
    assert (weight - round_to_nearest(weight, found)).norm() < (weight - round_to_nearest(weight, plain)).norm()


def test_a_group_of_zeros_has_a_positive_scale():
    grid = search_grid(torch.zeros(3, 64), INT4, 32)
    assert (grid.scales > 0).all() and not round_to_nearest(torch.zeros(3, 64), grid).any()


def test_hessian_does_not_depend_on_how_tokens_are_batched():
    _, x, h = inputs(k=700, tokens=300)  # more than one panel
    whole, parts = Hessian(700, torch.device("cpu")), Hessian(700, torch.device("cpu"))
    whole.add(x)
    for part in x.split(37):
        parts.add(part.view(1, *part.shape))
    assert parts.tokens == whole.tokens == 300
    assert torch.allclose(whole.matrix("layer"), parts.matrix("layer"), rtol=1e-4, atol=1e-4)
    assert torch.allclose(whole.matrix("layer").double(), h, rtol=1e-4, atol=1e-4)


def test_a_dead_input_changes_nothing_for_the_others():
    weight, x, _ = inputs(dtype=torch.float32)
    x[:, 10] = 0
    h = x.T @ x / len(x)
    result = damp(h)
    assert result.dead.tolist() == [j == 10 for j in range(64)]
    pruned, _ = sparsegpt(weight, result.factor)
    assert torch.isfinite(pruned).all()


def test_dampening_is_raised_when_it_is_too_small():
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 100
    result = damp(x.T @ x, 0.0)
    assert result.dampening > 0 and torch.isfinite(result.factor).all()


def test_a_hessian_that_no_dampening_saves_is_refused():
    with pytest.raises(UnsupportedError, match="layer 3: no dampening makes the Hessian positive definite"):
        damp(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), layer="layer 3")


def test_inputs_that_overflow_are_named():
    hessian = Hessian(4, torch.device("cpu"))
    hessian.add(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))
    with pytest.raises(FormatError, match="block 1: its inputs overflow or hold NaN during calibration"):
        hessian.matrix("block 1")


@pytest.mark.parametrize(("scheme", "group_size"), [("w4a16", 32), ("w4a16", -1), ("fp8", -1)])
def test_refitted_scales_solve_the_normal_equations_and_never_raise_the_error(scheme, group_size):
    weight, _, h = inputs(k=128, tokens=600)
    weight[3] = 0  # a row without a single code
    grid = search_grid(weight, SCHEMES[scheme], group_size)
    rounded = round_to_nearest(weight * magnitude_mask(weight), grid)
    found, new = refit_scales(weight, rounded, h, grid, torch.float32)
    before, after = energy(weight - rounded, h), energy(weight - found, h)
    assert (after <= before).all() and after.sum() < 0.999 * before.sum()
    assert torch.equal(new.encode(found), grid.encode(rounded)) and (new.scales > 0).all()
    # At the optimum the error is orthogonal to the codes of every group.
    codes = grid.encode(rounded).to(weight.dtype).unflatten(1, (new.scales.shape[1], -1))
    slope = (((weight - found) @ h).unflatten(1, codes.shape[1:]) * codes).sum(-1)
    unfitted = (((weight - rounded) @ h).unflatten(1, codes.shape[1:]) * codes).sum(-1)
    assert slope.abs().max() < 1e-3 * unfitted.abs().max()


def test_refitted_scales_are_storable():
    weight, _, h = inputs(k=128, tokens=600)
    grid = search_grid(weight.float(), INT4, 32, None, torch.bfloat16)
    rounded = round_to_nearest(weight.float() * magnitude_mask(weight), grid)
    found, new = refit_scales(weight.float(), rounded, h.float(), grid, torch.bfloat16)
    assert torch.equal(new.scales, new.scales.bfloat16().float())
    assert (energy(weight.float() - found, h.float()) <= energy(weight.float() - rounded, h.float())).all()
