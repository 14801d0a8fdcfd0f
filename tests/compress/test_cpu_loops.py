"""What compression runs on a CPU alone: Hessians and column loops in C++, attention in blocks, one pass in stages."""

import dataclasses
import platform
import statistics
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.compress.conftest import make_model
from vllm_sparse import native
from vllm_sparse.compress import compress, descent, gptq, job, sparsegpt
from vllm_sparse.compress.attention import FastAttention, causal_attention
from vllm_sparse.compress.descent import coordinate_descent
from vllm_sparse.compress.generate import generate
from vllm_sparse.compress.grid import search_grid
from vllm_sparse.compress.hessian import Hessian, damp
from vllm_sparse.compress.model import BlockCall
from vllm_sparse.compress.products import cholesky, inverse_of_lower, product, product_plus, subtract_product
from vllm_sparse.compress.sequences import Sequences
from vllm_sparse.compress.staged import StagedBlock, find_leaders, run_side_by_side
from vllm_sparse.scheme import get_scheme

needs_columns = pytest.mark.skipif(
    native.cpu is None or not native.tier().has_columns, reason="the C++ loops over columns need AVX-512"
)
needs_gram = pytest.mark.skipif(native.cpu is None or not native.tier().has_gram, reason="needs AVX-512 with BF16")


@needs_gram
@pytest.mark.parametrize(("m", "k"), [(1, 4), (33, 20), (515, 100), (1200, 64)])
def test_hessian_of_bf16_inputs_is_that_of_float64(m, k):
    x = torch.randn(2, m, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    hessian = Hessian(k, x.device)
    hessian.add(x[0])
    hessian.add(x[1].T.contiguous().T)  # rows that are not contiguous
    exact = x.flatten(0, 1).double()
    exact = exact.T @ exact / (2 * m)
    h = hessian.matrix("layer")
    assert hessian.tokens == 2 * m and torch.equal(h, h.T)
    assert (h.double() - exact).abs().max() < 1e-5 * exact.abs().max()


@needs_columns
@pytest.mark.parametrize(("scheme", "group"), [("w4a16", 32), ("int8", -1), ("fp8", -1)])
def test_column_loops_decide_what_the_eager_ones_do(monkeypatch, scheme, group):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(70, 96, generator=generator), torch.randn(400, 96, generator=generator)
    x[:, 1:] += x[:, :-1]
    hessian = Hessian(96, x.device)
    hessian.add(x)
    damped = damp(hessian.matrix("layer"))

    def run():
        pruned, mask = sparsegpt.sparsegpt(weight, damped.factor, block=32)
        grid = search_grid(pruned, get_scheme(scheme), group)
        rounded = gptq.gptq(pruned, damped.h, grid, mask, block=32)
        better = coordinate_descent(pruned, rounded, damped.h, grid, mask, 2, block=32)
        return mask, pruned, rounded, better, sparsegpt.sparsegpt(weight, damped.factor, grid, block=32)[0]

    fused = run()
    for module in (sparsegpt, gptq, descent):
        monkeypatch.setattr(module, "fused_columns", lambda weight: None)
    eager = run()
    assert torch.equal(fused[0], eager[0])
    for ours, expected in zip(fused[1:], eager[1:], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "heads", "shared"), [(1, 4, 4), (64, 4, 2), (150, 6, 1)])
def test_attention_is_torchs(length, heads, shared):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, heads, length, 16, generator=generator).bfloat16()
    key, value = torch.randn(2, 2, shared, length, 16, generator=generator).bfloat16()
    attention = nn.functional.scaled_dot_product_attention
    expected = attention(query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal_attention(query, key, value).float(), expected, rtol=0.02, atol=0.02)
    with torch.no_grad(), FastAttention():
        inside = attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.5)
        masked = attention(query, key, value, attn_mask=torch.ones(length, length, dtype=torch.bool), enable_gqa=True)
    assert torch.equal(inside, causal_attention(query, key, value, scale=0.5))
    assert torch.equal(
        masked,
        attention(query, key, value, attn_mask=torch.ones(length, length, dtype=torch.bool), enable_gqa=True),
    )


class Block(nn.Module):
    """Two layers of one input, one after them, and one that nobody calls."""

    def __init__(self, size):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, x):
        return self.c(self.a(x) * self.b(x))


def staged_block(size=8, length=5, dtype=torch.float32):
    torch.manual_seed(3)
    block = Block(size).requires_grad_(False).to(dtype)
    batches = [(BlockCall((), {}), torch.randn(2, length, size, dtype=dtype)) for _ in range(3)]
    linears = {f"block.{name}": layer for name, layer in block.named_children()}
    leaders = find_leaders(block, linears, batches[0])
    return block, batches, linears, StagedBlock(block, linears, batches, leaders, ranges=True, to_the_end=True)


def test_stages_see_the_inputs_of_compressed_layers():
    block, batches, linears, staged = staged_block()
    seen = {}
    for group in staged.groups():
        seen[group.names] = group
        for name in group.names:
            linears[name].weight.mul_(0.5)
    x = torch.cat([x.flatten(0, 1) for _, x in batches])
    inner = block.a(x) * block.b(x)  # with the weights of now, as the third layer saw them
    assert list(seen) == [("block.a", "block.b"), ("block.c",), ("block.d",)]
    torch.testing.assert_close(seen["block.a", "block.b"].h, x.T @ x / 30)
    torch.testing.assert_close(seen["block.c",].h, inner.T @ inner / 30)
    assert seen["block.c",].tokens == 30 and float(seen["block.c",].largest) == float(inner.abs().max())
    assert dataclasses.astuple(seen["block.d",])[1:] == (None, 0, None, None)
    for output, (_, one) in zip(staged.outputs(), batches, strict=True):
        torch.testing.assert_close(output, block(one))
    staged.close()


def test_stages_end_when_they_are_abandoned_and_pass_errors_on():
    block, _, _, staged = staged_block()
    next(staged.groups())
    staged.close()
    assert not any(one.is_alive() for one in staged._passes)
    block, _, _, staged = staged_block()
    block.c.forward = lambda x: 1 / 0
    groups = staged.groups()
    next(groups), next(groups)
    with pytest.raises(ZeroDivisionError):
        next(groups)
    staged.close()


@needs_gram
def test_passes_side_by_side_see_what_they_see_one_after_another():
    def run(threads):
        torch.set_num_threads(threads)
        block, batches, _, staged = staged_block(256, 300, torch.bfloat16)
        groups = list(staged.groups())
        staged.close()
        assert torch.get_num_threads() == threads
        again = run_side_by_side(block, batches)  # as a resumed run does
        assert all(torch.equal(*both) for both in zip(staged.outputs(), again, strict=True))
        return [group.h for group in groups if group.h is not None], staged.outputs()

    before = torch.get_num_threads()
    try:
        alone, together = run(1), run(2)
    finally:
        torch.set_num_threads(before)
    for one, other in zip((*alone[0], *alone[1]), (*together[0], *together[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_freed_memory_is_not_given_back_to_the_system():
    program = """
import resource, sys, threading, torch
from vllm_sparse.compress.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(4):
    thread = threading.Thread(target=lambda: [torch.ones(1 << 21) for _ in range(10)])
    thread.start()
    thread.join()
print(faults() - before)
"""

    def count(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", program, how], check=True, capture_output=True).stdout)

    # Where small things lie between large ones decides what fits again: one run of twenty has half as many faults more.
    faults = {how: statistics.median(count(how) for _ in range(3)) for how in ("keep", "not")}
    assert faults["keep"] < faults["not"] / 2


@pytest.mark.parametrize("k", [300, 640, 1000])
def test_products_and_factors_are_torchs(k):
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(k, k, generator=generator), torch.randn(200, k, generator=generator)
    expected = a.double() @ b.double().T
    torch.testing.assert_close(product(a, b).double(), expected, rtol=1e-5, atol=1e-3)
    c = torch.ones(k, 200)
    torch.testing.assert_close(product_plus(a, b, c, 0.5).double(), expected + 0.5, rtol=1e-5, atol=1e-3)
    subtract_product(c, a.T.contiguous(), b.T.contiguous())
    torch.testing.assert_close(c.double(), 1 - expected, rtol=1e-5, atol=1e-3)
    h = a @ a.T / k + 0.1 * torch.eye(k)
    lower = cholesky(h)
    torch.testing.assert_close(lower.double(), torch.linalg.cholesky(h.double()), rtol=1e-3, atol=1e-4)
    assert torch.equal(lower, lower.tril())
    torch.testing.assert_close(inverse_of_lower(lower) @ lower, torch.eye(k), rtol=0, atol=1e-3)
    h[k - 1, k - 1] = -1  # found in the last panel
    assert cholesky(h) is None


def test_both_ways_through_a_block_give_the_same_kind_of_model(tiny, text, tmp_path, monkeypatch):
    options = {"calibration": text, "num_samples": 8, "seq_len": 64, "device": "cpu", "scheme": "bf16", "quiet": True}
    staged = compress(tiny, tmp_path / "staged", **options)
    monkeypatch.setattr(job, "_STAGED_BYTES", 0)
    whole = compress(tiny, tmp_path / "whole", **options)
    assert [layer.name for layer in staged.layers] == [layer.name for layer in whole.layers]
    first, other = staged.layers[0], whole.layers[0]
    assert first.tokens == other.tokens == 8 * 64
    assert first.error == pytest.approx(other.error, rel=0.02)  # its inputs are the same in both


def test_generated_text_begins_with_calibration_text_and_repeats(tmp_path):
    model = make_model(tmp_path / "model")
    tokens = torch.randint(257, (3, 40), generator=torch.Generator().manual_seed(4))
    sequences, device = Sequences.of(tokens), torch.device("cpu")
    first, again = (generate(model, sequences, 5, device, torch.float32, seed=7) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (5, 40)
    for row, text in enumerate(first):
        source = tokens[row % 3].unfold(0, 32, 1)
        assert (source == text[:32]).all(1).any()


def test_generated_sequences_are_calibration_sequences(tiny, text, tmp_path):
    report = compress(
        tiny, tmp_path / "out", calibration=text, num_samples=4, seq_len=48, generate=3, device="cpu", quiet=True,
        scheme="bf16", pruner="wanda",
    )  # fmt: skip
    assert report.layers[0].tokens == 7 * 48
    assert report.calibration["generated"] == 3
