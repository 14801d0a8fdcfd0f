"""Outputs that matter together: exact identities, and what it is all for."""

from types import SimpleNamespace

import pytest
import torch

from tests.compress.conftest import make_model
from vllm_sparse.compress import compress
from vllm_sparse.compress.coupled import coupled_error, coupled_least_squares, damp_outputs, round_coupled, row_targets
from vllm_sparse.compress.curvature import block_fisher, output_curvature
from vllm_sparse.compress.grid import search_grid
from vllm_sparse.compress.least_squares import least_squares
from vllm_sparse.compress.magnitude import magnitude_mask
from vllm_sparse.compress.model import BlockCall
from vllm_sparse.compress.sequences import Sequences
from vllm_sparse.compress.world import World
from vllm_sparse.scheme import get_scheme

N, K = 12, 16


@pytest.fixture
def problem():
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=dice, dtype=torch.float64)
    x, y = (torch.randn(60, size, generator=dice, dtype=torch.float64) for size in (K, N))
    mix = torch.randn(N, N, generator=dice, dtype=torch.float64)
    y = y @ mix
    return weight, magnitude_mask(weight), x.T @ x / 60, y.T @ y / 60


def test_the_weights_solve_the_normal_equations_of_all_outputs_together(problem):
    weight, mask, h, g = problem
    v = coupled_least_squares(weight, weight * mask, mask, h, g)
    for _ in range(20):
        v = coupled_least_squares(weight, v, mask, h, g)
    assert float(((g @ (v - weight) @ h) * mask).abs().max()) < 1e-9 and not v[~mask].any()
    # The same from a system in all kept entries at once, solved directly.
    kept = mask.flatten()
    system = torch.kron(g, h)[kept][:, kept]
    exact = torch.zeros(N * K, dtype=torch.float64)
    exact[kept] = torch.linalg.solve(system, (torch.kron(g, h) @ weight.flatten())[kept])
    torch.testing.assert_close(v.flatten(), exact, rtol=0, atol=1e-8)


def test_outputs_that_do_not_act_together_are_solved_row_by_row(problem):
    weight, mask, h, g = problem
    alone = least_squares(weight, weight * mask, mask, h, 200)
    diagonal = torch.diag(g.diagonal())
    together = coupled_least_squares(weight, weight * mask, mask, h, diagonal)
    for _ in range(20):
        together = coupled_least_squares(weight, together, mask, h, diagonal)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)
    torch.testing.assert_close(row_targets(weight, alone, diagonal), weight)


def test_a_row_at_its_target_is_the_best_for_the_others(problem):
    weight, mask, h, g = problem
    v = coupled_least_squares(weight, weight * mask, mask, h, g)
    moved = v.clone()
    moved[3] = row_targets(weight, v, g, slice(3, 4))[0]
    least = coupled_error(moved - weight, h, g)
    for sign in (-1, 1):
        other = moved.clone()
        other[3] += sign * 0.01 * torch.randn(K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert coupled_error(other - weight, h, g) > least
    assert least < coupled_error(v - weight, h, g)


@pytest.mark.parametrize("scheme", ["w4a16", "fp8"])
def test_rounding_together_lowers_the_error_and_keeps_the_mask(problem, scheme):
    weight, mask, h, g = (part.float() if part.is_floating_point() else part for part in problem)
    grid = search_grid(weight * mask, get_scheme(scheme), -1)
    codes = grid.encode(weight * mask).float()
    rounded, new = round_coupled(weight, codes * grid.scales, mask, h, g, grid, torch.float32)
    before, after = (coupled_error(q - weight, h, g) for q in (codes * grid.scales, rounded))
    assert after < 0.9 * before and not rounded[~mask].any()
    torch.testing.assert_close(new.encode(rounded).float() * new.scales, rounded)


def test_the_curvature_of_a_linear_block_is_known():
    """Of out(mid(x)) with one size for all tokens: G is F for out, and out^T F out for mid."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False), torch.nn.Linear(6, 4, bias=False)).double()
    linears = {"mid": block[0], "out": block[1]}
    x = torch.randn(1, 8, dtype=torch.float64).expand(1, 40000, 8)
    fisher = torch.randn(4, 7) @ torch.randn(7, 4)
    fisher = fisher @ fisher.T
    g = output_curvature(block, linears, [(BlockCall((), {}), x)], fisher, 1, 0, World())
    square, out = block(x)[0, 0].float().square().mean(), block[1].weight.detach().float()
    size = fisher.diagonal().mean()
    torch.testing.assert_close(g["out"] * square / size, fisher / size, rtol=0.05, atol=0.05)
    torch.testing.assert_close(g["mid"] * square / size, out.T @ fisher @ out / size, rtol=0.05, atol=0.05)
    assert damp_outputs(torch.zeros(3, 3)).diagonal().min() > 0


def test_the_fisher_information_of_the_last_block_is_that_of_the_softmax():
    """Behind a head alone, the mean of g g^T over labels the model draws is W^T (diag(p) - p p^T) W."""
    torch.manual_seed(0)

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block, self.head = torch.nn.Embedding(2, 3), torch.nn.Identity(), torch.nn.Linear(3, 5)

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.head(self.block(self.embed(input_ids))))

    toy = Toy().requires_grad_(False)
    sequences = Sequences.of(torch.zeros(100, 400).long())
    (fisher,) = block_fisher(toy, [toy.block], sequences, 0, World())
    x, w = toy.embed.weight[0], toy.head.weight
    p = toy.head(x).softmax(0)
    exact = w.T @ (p.diag() - p.outer(p)) @ w * x.square().mean()
    torch.testing.assert_close(fisher, exact, rtol=0.05, atol=0.02 * float(exact.diagonal().max()))


@pytest.mark.parametrize("scheme", ["bf16", "w4a16", "fp8"])
def test_a_block_is_nearer_to_the_dense_one(text, tmp_path, scheme):
    from vllm_sparse.compress.evaluate import load_dense

    model = make_model(tmp_path / "model", num_hidden_layers=1)
    small = {"num_samples": 32, "seq_len": 64, "quiet": True, "device": "cpu", "scheme": scheme}
    small |= {"group_size": 32} if scheme == "w4a16" else {}
    ids = torch.randint(257, (8, 60), generator=torch.Generator().manual_seed(0))
    dense, apart = load_dense(model).model(ids).last_hidden_state, {}
    for curvature in (0, 32):
        report = compress(model, tmp_path / str(curvature), calibration=text, curvature=curvature, **small)
        assert report.verification.violations == 0
        hidden = load_dense(tmp_path / str(curvature)).model(ids).last_hidden_state
        apart[curvature] = float((hidden - dense).square().mean())
    assert apart[32] < apart[0]
    assert all(layer.optimum_ratio is None for layer in report.layers)
