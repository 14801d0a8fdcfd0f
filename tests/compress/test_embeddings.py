"""Embeddings in 8 bits: what ``compress`` writes, plans and refuses."""

import pytest
import torch

from tests.compress.conftest import config_of, make_model
from tests.formats.weights import same_bits
from vllm_sparse.cli import main
from vllm_sparse.compress import compress
from vllm_sparse.compress.evaluate import load_dense
from vllm_sparse.compress.pipeline import dry_run
from vllm_sparse.errors import OptionError, UnsupportedError
from vllm_sparse.formats.checkpoint import Checkpoint
from vllm_sparse.formats.convert import convert
from vllm_sparse.formats.embedding import dequantize_rows, quantize_table

TABLE = "model.embed_tokens"
OPTIONS = {"scheme": "bf16", "pruner": "magnitude", "embeddings": "int8", "device": "cpu"}


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_becomes_codes_and_scales(tmp_path, tied):
    model = make_model(tmp_path / "model", tie_word_embeddings=tied)
    plan = dry_run(model, tmp_path / "out", **OPTIONS)
    report = compress(model, tmp_path / "out", quiet=True, **OPTIONS)
    before, after = Checkpoint(model), Checkpoint(tmp_path / "out")
    for last, tensor in quantize_table(before.load(f"{TABLE}.weight")).items():
        assert same_bits(after.load(f"{TABLE}.{last}"), tensor)
    assert after.config["quantization_config"]["int8_embeddings"] == [TABLE]
    assert after.config["quantization_config"]["ignore"] == ["lm_head"]
    assert after.config["tie_word_embeddings"] is tied and ("lm_head.weight" in after.tensors) is not tied
    assert plan.bytes_after == report.bytes_after == sum(info.nbytes for info in after.tensors.values())
    assert "stored as bf16, the embeddings in int8" in (tmp_path / "out/README.md").read_text()


def test_evaluation_reads_it_and_conversion_restores_it(tmp_path):
    compress(make_model(tmp_path / "model"), tmp_path / "out", quiet=True, **OPTIONS)
    convert(tmp_path / "out", tmp_path / "dense", to="dense")
    loaded, restored = load_dense(tmp_path / "out"), load_dense(tmp_path / "dense")
    table = {last: Checkpoint(tmp_path / "out").load(f"{TABLE}.{last}") for last in ("weight", "weight_scale")}
    expected = dequantize_rows(*table.values(), torch.float32)
    assert torch.equal(loaded.get_input_embeddings().weight, expected)
    assert torch.equal(loaded.get_output_embeddings().weight, expected)
    assert torch.equal(restored.get_input_embeddings().weight, expected.bfloat16().float())
    assert "quantization_config" not in config_of(tmp_path / "dense")


def test_int8_embeddings_need_the_native_format(tmp_path):
    message = "recipe: embeddings int8 can only be written with format sparse24"
    with pytest.raises(OptionError) as error:
        compress(tmp_path, tmp_path / "out", format="dense", **OPTIONS)
    assert str(error.value) == message


def test_other_kinds_are_refused(tmp_path, capsys):
    arguments = ["compress", str(tmp_path), "-o", str(tmp_path / "out"), "--embeddings", "int4"]
    assert main(arguments) == 2
    assert "unknown embeddings 'int4': expected one of dense, int8" in capsys.readouterr().err


def test_a_table_that_is_no_embedding_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.get_input_embeddings", lambda model: torch.nn.Identity())
    with pytest.raises(UnsupportedError, match=r"its token embeddings are no nn\.Embedding but a Identity, and have"):
        compress(tiny, tmp_path / "out", quiet=True, **OPTIONS)
