"""A head that is 2:4 as well: padded, cut by tokens, and through vLLM's engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.encoders import encode
from tests.formats.golden import CASES, config, layer
from tests.plugin.agreement import assert_greedy
from tests.plugin.conftest import PROMPTS, VllmContext
from tests.plugin.layers import format_of, load, new_config, prune_to_two_of_four, random_hub
from tests.plugin.models import random_model, save_native
from vllm_sparse.errors import FormatError

pytest.importorskip("vllm")
TOKENS, HIDDEN = 100, 128  # vLLM pads 100 tokens to 128


def new_head(quant_config: Any, tokens: int = TOKENS) -> Any:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return ParallelLMHead(tokens, HIDDEN, quant_config=quant_config, prefix="lm_head")


def product(head: Any) -> torch.Tensor:
    head.quant_method.process_weights_after_loading(head)
    return head.quant_method.apply(head, torch.eye(HIDDEN)).T


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scheme", ["bf16", "w4a16", "fp8"])
def test_ranks_hold_their_tokens(vllm_context: VllmContext, scheme: str, size: int) -> None:
    weight = random_hub(TOKENS, HIDDEN, scheme)
    rows = []
    for rank in range(size):
        with vllm_context(rank, size):
            head = new_head(new_config(format_of(weight)))
            load(head, format_of(weight).from_weight(weight))
            own = head.shard_indices
            rows.append(product(head)[: own.org_vocab_end_index - own.org_vocab_start_index])
    torch.testing.assert_close(torch.cat(rows), weight.to_dense(), rtol=1e-5, atol=1e-6)


def test_a_bitmask_may_hold_the_head(vllm_context: VllmContext) -> None:
    from vllm_sparse.plugin.config import Sparse24Config

    case = replace(next(case for case in CASES if case.name == "bitmask-bf16"), n=TOKENS, k=HIDDEN)
    found, made = config(case), layer(case)
    found["ignore"] = found["sparsity_config"]["ignore"] = []
    tensors = {name: tensor for name, tensor in encode(case, made).items() if name in ("compressed", "bitmask")}
    with vllm_context():
        head = new_head(Sparse24Config.from_config(found))
        load(head, tensors)
        torch.testing.assert_close(product(head)[:TOKENS], made["codes"].float())


def test_a_head_that_is_ignored_is_left_to_vllm(vllm_context: VllmContext) -> None:
    with vllm_context():
        head = new_head(new_config(format_of(random_hub(TOKENS, HIDDEN, "fp8"), ignore=("lm_head",))))
    assert type(head.quant_method).__name__ == "UnquantizedEmbeddingMethod"


def test_wrong_tensors_of_a_head_are_named(vllm_context: VllmContext) -> None:
    weight = random_hub(TOKENS, HIDDEN, "fp8")
    tensors = format_of(weight).from_weight(weight)
    with vllm_context():
        head = new_head(new_config(format_of(weight)), TOKENS + 1)
        with pytest.raises(FormatError, match=r"lm_head: tensor \w+: expected shape \[101, \d+\] .* got \[100, \d+\]"):
            load(head, tensors)
        head = new_head(new_config(format_of(weight)))
        with pytest.raises(FormatError, match=r"lm_head: tensor weight_scale: expected torch.float32"):
            load(head, tensors | {"weight_scale": tensors["weight_scale"].to(torch.int32)})


@pytest.mark.serve
def test_sparse_head_in_the_engine(engine: Any, tmp_path: Path) -> None:
    model = random_model()
    model.lm_head.weight.data = prune_to_two_of_four(model.lm_head.weight.data)
    stored = save_native(model, tmp_path / "m", "w4a16", ignore=())
    assert_greedy(stored.reference, PROMPTS, engine(stored.path), ("native", "w4a16", "llama, the head too"))
