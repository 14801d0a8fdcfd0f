"""Embeddings in 8 bits: cut by tokens and padded, shared with the head or not, and through vLLM's engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.plugin.agreement import assert_greedy
from tests.plugin.conftest import PROMPTS, VllmContext
from tests.plugin.layers import format_of, load, new_config, random_hub
from tests.plugin.models import random_model, save_native
from tests.plugin.test_behaviour import assert_reloads_in_place
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.formats.embedding import dequantize_rows, quantize_table

pytest.importorskip("vllm")
TOKENS, HIDDEN, TABLE = 100, 32, "model.embed_tokens"  # vLLM pads 100 tokens to 128
FORM = replace(format_of(random_hub(8, 64, "bf16"), ignore=("lm_head",)), embeddings=(TABLE,))


def new_embedding(quant_config: Any, prefix: str = TABLE, tokens: int = TOKENS) -> Any:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return VocabParallelEmbedding(tokens, HIDDEN, quant_config=quant_config, prefix=prefix)


def table_of(seed: int = 0) -> dict[str, torch.Tensor]:
    return quantize_table(torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("prefix", [TABLE, ""])  # vLLM's Llama does not tell the name
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_hold_their_tokens(vllm_context: VllmContext, size: int, prefix: str) -> None:
    table, rows = table_of(), []
    for rank in range(size):
        with vllm_context(rank, size):
            layer = new_embedding(new_config(FORM), prefix)
            load(layer, table)
            layer.quant_method.process_weights_after_loading(layer)
            own = layer.shard_indices
            assert layer.weight.shape == (128 // size, HIDDEN) and layer.weight_scale.shape == (128 // size, 1)
            ids = torch.arange(own.org_vocab_end_index - own.org_vocab_start_index)
            rows.append(layer.quant_method.embedding(layer, ids))
    assert torch.equal(torch.cat(rows), dequantize_rows(*table.values(), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [32, 40])  # torch's product of bf16 and int8 takes multiples of 32 alone
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_product_with_the_codes(dtype: torch.dtype, features: int, tokens: int) -> None:
    from vllm_sparse.plugin.embedding import product

    generator = torch.Generator().manual_seed(0)
    table = quantize_table(torch.randn(9000, features, generator=generator))
    x = torch.randn(tokens, features, generator=generator).to(dtype)
    found = product(x, table["weight"], table["weight_scale"])
    expected = x.double() @ dequantize_rows(*table.values(), torch.float64).T
    assert found.dtype == dtype and found.shape == (tokens, 9000)
    # Weights, products or logits are rounded to the dtype, depending on the way: twice its half last place and more.
    bound = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert float((found - expected).norm() / expected.norm()) < bound


def test_other_embeddings_stay_with_vllm(vllm_context: VllmContext) -> None:
    with vllm_context():
        layer = new_embedding(new_config(FORM), "model.other_embeddings")
    assert type(layer.quant_method).__name__ == "UnquantizedEmbeddingMethod"


def test_embeddings_of_compressed_tensors_are_its_own(vllm_context: VllmContext) -> None:
    from vllm_sparse.plugin.config import Sparse24Config

    pytest.importorskip("vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_embedding")
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Embedding"], "weights": int8, "input_activations": None, "output_activations": None}
    found = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    with vllm_context():
        layer = new_embedding(Sparse24Config.from_config(found))
    assert type(layer.quant_method).__name__ == "CompressedTensorsEmbeddingWNA16Int"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(TOKENS, HIDDEN)}, "tensor weight: expected torch.int8 in the checkpoint, got torch.flo"),
        (
            {"weight_scale": torch.ones(TOKENS - 1, 1).bfloat16()},
            r"tensor weight_scale: expected shape \[100, 1\] in the checkpoint, got \[99, 1\]",
        ),
        ({"weight_scale": torch.zeros(TOKENS, 1).bfloat16()}, "100 scales are not finite and greater than zero"),
        ({"weight_scale": None}, "tensor weight_scale is not in the checkpoint"),
    ],
)
def test_wrong_tensors_are_named(vllm_context: VllmContext, changes: dict[str, Any], message: str) -> None:
    tensors = {name: tensor for name, tensor in (table_of() | changes).items() if tensor is not None}
    with vllm_context():
        layer = new_embedding(new_config(FORM))
        with pytest.raises(FormatError, match=f"^{TABLE}: {message}"):
            load(layer, tensors)
            layer.quant_method.process_weights_after_loading(layer)


def test_a_model_that_hides_its_embeddings_is_named(vllm_context: VllmContext) -> None:
    with vllm_context(), pytest.raises(UnsupportedError, match=f"^{TABLE}: stored in int8, but vLLM's model does not"):
        new_config(FORM).get_cache_scale_mapper()


def test_a_shared_head_needs_the_table(vllm_context: VllmContext, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    monkeypatch.setattr("vllm_sparse.plugin.config.shares_embeddings", lambda: True)
    with vllm_context(), pytest.raises(UnsupportedError, match=f"^{TABLE}: stored in int8, but vLLM's model does not"):
        ParallelLMHead(TOKENS, HIDDEN, quant_config=new_config(FORM), prefix="lm_head")


def save(model: Any, path: Path) -> Any:
    return save_native(model, path, "bf16", embeddings=(TABLE,))


@pytest.mark.serve
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_int8_embeddings_in_the_engine(engine: Any, tmp_path: Path, kind: str, tied: bool) -> None:
    stored = save(random_model(kind, vocab_size=300, tie_word_embeddings=tied), tmp_path / "m")
    row = ("native", "bf16", f"{kind}, int8 embeddings{', the head too' if tied else ''}")
    assert_greedy(stored.reference, PROMPTS, engine(stored.path), row)


@pytest.mark.serve
@pytest.mark.parametrize("tied", [False, True])
def test_int8_embeddings_of_two_processes(engine: Any, tmp_path: Path, tied: bool) -> None:
    stored = save(random_model("qwen2", intermediate_size=512, tie_word_embeddings=tied), tmp_path / "m")
    assert_greedy(stored.reference, PROMPTS, engine(stored.path, tensor_parallel_size=2))


@pytest.mark.serve
def test_int8_embeddings_of_a_compiled_model(engine: Any, tmp_path: Path) -> None:
    stored = save(random_model(tie_word_embeddings=True), tmp_path / "m")
    assert_greedy(stored.reference, PROMPTS, engine(stored.path, enforce_eager=False))


@pytest.mark.serve
@pytest.mark.parametrize("tied", [False, True])
def test_reload_keeps_the_table_in_place(session: Callable[..., Any], tmp_path: Path, tied: bool) -> None:
    first = save(random_model(tie_word_embeddings=tied), tmp_path / "a")
    other = save(random_model(seed=1, tie_word_embeddings=tied), tmp_path / "b")
    assert_reloads_in_place(session(first.path, enable_prefix_caching=False), first, other)


@pytest.mark.serve
@pytest.mark.parametrize("options", [{"load_format": "dummy"}, {"dtype": "bfloat16"}, {"enable_lora": True}])
def test_int8_embeddings_start(engine: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    stored = save(random_model(tie_word_embeddings=True), tmp_path / "m")
    assert len(engine(stored.path, **options)) == len(PROMPTS)


@pytest.mark.serve
def test_a_wrong_scale_is_named_with_its_file(engine: Any, tmp_path: Path) -> None:
    file = save(random_model(), tmp_path / "m").path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{TABLE}.weight_scale"][7] = float("nan")
    save_file(tensors, file)
    with pytest.raises(FormatError, match=f"^{file}: {TABLE}: 1 scales are not finite and greater than zero"):
        engine(file.parent)
