"""Whole models through vLLM's engine: greedy tokens are those of the transformers model with the same weights.

Everything runs in float32, where no tie between two tokens is close enough for the order of a sum to decide it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.formats.golden import CASES
from tests.plugin.models import (
    linear_layers,
    quantize_inputs,
    random_model,
    save_dense,
    save_native,
    save_published,
)

pytest.importorskip("vllm")
pytestmark = pytest.mark.serve
PROMPTS = [[5, 17, 99, 200, 31, 7], [3, 3], [250, 1, 90, 12, 44, 45, 46, 47, 48]]
NEW_TOKENS = 12


@pytest.fixture
def engine() -> Iterator[Any]:
    """Return ``start(path, **options)``, which loads a model into this process and returns ``generate``."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    started: list[Any] = []

    def start(path: Path, sparse24: dict[str, Any] | None = None, **options: Any) -> list[list[int]]:
        defaults = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True}
        extra = {"additional_config": {"sparse24": sparse24}} if sparse24 else {}
        llm = LLM(str(path), **defaults | extra | options)
        started.append(llm)
        wanted = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, wanted, use_tqdm=False)]

    yield start
    started.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


def greedy(model: PreTrainedModel) -> list[list[int]]:
    """Return what the reference model continues the prompts with."""
    model = model.float()
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        out.append(made[0, len(prompt) :].tolist())
    return out


@pytest.mark.parametrize(
    ("kind", "scheme", "static"),
    [
        ("llama", "bf16", False),
        ("qwen2", "bf16", False),
        ("llama", "w4a16", False),
        ("qwen2", "w8a16", False),
        ("llama", "int8", False),
        ("qwen2", "int8", True),
        ("llama", "fp8", False),
        ("llama", "fp8", True),
    ],
)
def test_native_checkpoint(engine: Any, tmp_path: Path, kind: str, scheme: str, static: bool) -> None:
    stored = save_native(random_model(kind), tmp_path / "m", scheme, static)
    quantize_inputs(stored.reference, scheme, static)
    assert engine(stored.path) == greedy(stored.reference)


PUBLISHED = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    ("name", "scheme", "flag"),
    [
        ("bitmask-bf16", "bf16", False),
        ("bitmask-fp8", "fp8", False),
        ("bitmask-int8", "int8", False),
        ("marlin-4bit-g128-k256", "w4a16", False),
        ("packed-4bit-g32", "w4a16", True),
        ("quantized-fp8-channel", "fp8", True),
        ("quantized-int8-tensor", "int8", True),
    ],
)
def test_published_checkpoint(engine: Any, tmp_path: Path, name: str, scheme: str, flag: bool) -> None:
    stored = save_published(random_model(), tmp_path / "m", PUBLISHED[name])
    quantize_inputs(stored.reference, scheme, static=False)
    options = {"quantization": "sparse24"} if flag else {}
    assert engine(stored.path, **options) == greedy(stored.reference)


def test_dense_checkpoint_with_a_layer_that_is_not_sparse(engine: Any, tmp_path: Path) -> None:
    model = random_model("qwen2")
    linear_layers(model)["model.layers.1.mlp.down_proj"].weight.data.normal_(std=0.08)
    path = save_dense(model, tmp_path / "m")
    assert engine(path, quantization="sparse24") == greedy(model)


def test_dense_checkpoint_quantized_while_loading(engine: Any, tmp_path: Path) -> None:
    path = save_dense(random_model(), tmp_path / "dense")
    stored = save_native(random_model(), tmp_path / "native", "w4a16")
    assert engine(path, {"scheme": "w4a16"}, quantization="sparse24") == greedy(stored.reference)


@pytest.mark.parametrize("stored", ["native", "dense"])
def test_dummy_weights(engine: Any, tmp_path: Path, stored: str) -> None:
    model = random_model()
    path = save_dense(model, tmp_path / "m") if stored == "dense" else save_native(model, tmp_path / "m", "fp8").path
    options = {"quantization": "sparse24"} if stored == "dense" else {}
    assert [len(tokens) for tokens in engine(path, load_format="dummy", **options)] == [NEW_TOKENS] * len(PROMPTS)


def test_compiled_model(engine: Any, tmp_path: Path) -> None:
    stored = save_native(random_model(), tmp_path / "m", "w4a16")
    assert engine(stored.path, enforce_eager=False) == greedy(stored.reference)
