"""What a 2:4 model does in vLLM besides generating: new weights, speculation, cached prefixes."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugin.agreement import Continuation, assert_greedy
from tests.plugin.conftest import PROMPTS, Session
from tests.plugin.models import Stored, quantize_inputs, random_model, save_dense, save_native

pytest.importorskip("vllm")
pytestmark = pytest.mark.serve
Start = Callable[..., Any]


def addresses(model: torch.nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return where every tensor of a model is, and its shape: what CUDA graphs hold on to."""
    return {name: (tensor.data_ptr(), tuple(tensor.shape)) for name, tensor in model.named_parameters()}


def replace_weights(path: Path, by: Path) -> None:
    shutil.copyfile(by / "model.safetensors", path / "model.safetensors")


def assert_reloads_in_place(run: Any, first: Stored, other: Stored, *row: Any) -> None:
    """Check that the running ``first`` says what ``other`` does once that one's weights are in its file."""
    assert_greedy(first.reference, PROMPTS, run.generate())
    before = run.llm.apply_model(addresses)
    replace_weights(first.path, other.path)
    run.llm.collective_rpc("reload_weights")
    assert run.llm.apply_model(addresses) == before
    assert_greedy(other.reference, PROMPTS, run.generate(), *row)


@pytest.mark.parametrize("scheme", ["fp8", "w4a16"])
def test_reload_of_other_weights(session: Start, tmp_path: Path, scheme: str) -> None:
    first = save_native(random_model(), tmp_path / "a", scheme)
    other = save_native(random_model(seed=1), tmp_path / "b", scheme)
    for stored in (first, other):
        quantize_inputs(stored.reference, scheme)
    run = session(first.path, enable_prefix_caching=False)
    assert_reloads_in_place(run, first, other, ("native", scheme, "reloaded"))


def test_reload_of_a_model_found_to_be_sparse(session: Start, tmp_path: Path) -> None:
    path, other = save_dense(random_model(), tmp_path / "a"), random_model(seed=1)
    run = session(path, quantization="sparse24", enable_prefix_caching=False)
    run.generate()
    replace_weights(path, save_dense(other, tmp_path / "b"))
    run.llm.collective_rpc("reload_weights")
    assert_greedy(other, PROMPTS, run.generate(), ("dense", "bf16", "reloaded"))


def test_reload_of_experts(session: Start, tmp_path: Path) -> None:
    from tests.plugin.mixtures import reference, save_dense

    path = save_dense(tmp_path / "a", "mixtral")
    run = session(path, quantization="sparse24", enable_prefix_caching=False)
    run.generate()
    before = run.llm.apply_model(addresses)
    other = save_dense(tmp_path / "b", "mixtral", seed=1)
    replace_weights(path, other)
    run.llm.collective_rpc("reload_weights")
    assert run.llm.apply_model(addresses) == before
    assert_greedy(reference(other), PROMPTS, run.generate(), ("dense", "bf16", "mixtral, reloaded"))


def speculate(path: Path, prompts: list[list[int]]) -> tuple[list[Continuation], dict[str, float]]:
    """Continue ``prompts`` twice, guessing by n-grams; return the second result, and vLLM's counters."""
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    options = {"enable_prefix_caching": True, "max_model_len": 128, "block_size": 32, "disable_log_stats": False}
    run = Session(path, speculative_config=guess, **options)
    run.generate(prompts)
    again = run.generate(prompts)
    return again, {metric.name: float(getattr(metric, "value", 0)) for metric in run.llm.get_metrics()}


def test_speculation_and_cached_prefixes(tmp_path: Path) -> None:
    stored = save_native(random_model(), tmp_path / "m", "w4a16")
    prompts = [prompt * 6 for prompt in PROMPTS]  # repeated, so that there is something to guess, and whole blocks
    # In a process of its own: what it imports keeps vLLM from starting again in the same one.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        continued, counters = pool.submit(speculate, stored.path, prompts).result()
    assert_greedy(stored.reference, prompts, continued, ("native", "w4a16", "ngram speculation, cached prefixes"))
    assert counters["vllm:prefix_cache_hits"] > 0
    assert counters["vllm:spec_decode_num_draft_tokens"] > 0
