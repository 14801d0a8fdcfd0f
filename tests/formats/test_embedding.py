"""Embedding tables in 8 bits: how exact they are, what conversion and inspection do, and what is refused."""

import pytest
import torch

from tests.formats.checkpoints import write_checkpoint
from tests.formats.weights import random_weight, same_bits
from vllm_sparse.cli import main
from vllm_sparse.errors import FormatError
from vllm_sparse.formats import detect
from vllm_sparse.formats.checkpoint import Checkpoint
from vllm_sparse.formats.convert import convert
from vllm_sparse.formats.embedding import dequantize_rows, quantize_table, table_tensors
from vllm_sparse.formats.sparse24 import Sparse24Format
from vllm_sparse.scheme import SCHEMES

TABLE, UP = "model.embed_tokens", "model.layers.0.mlp.up_proj"
FORM = Sparse24Format(SCHEMES["w4a16"], scale_dtype="float32", ignore=("lm_head",), embeddings=(TABLE,))


def random_table(n=9, k=32, seed=0):
    """Return rows of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator) * torch.logspace(-6, 4, n)[:, None]
    return rows.index_fill(0, torch.tensor([2]), 0).bfloat16()


def native(path, changes=None):
    """Write a checkpoint with a table in 8 bits, in which ``changes`` (None: remove) replace tensors; return it."""
    tensors = {f"{UP}.{last}": tensor for last, tensor in FORM.from_weight(random_weight(FORM.scheme, 8, 32)).items()}
    tensors |= {f"{TABLE}.{last}": tensor for last, tensor in quantize_table(random_table()).items()}
    tensors["lm_head.weight"] = random_table(seed=1)
    tensors |= {f"{TABLE}.{last}": tensor for last, tensor in (changes or {}).items()}
    return write_checkpoint(path, {name: t for name, t in tensors.items() if t is not None}, FORM.to_config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_a_step_is_the_largest_error(dtype):
    table = random_table().to(dtype)
    stored = quantize_table(table)
    assert [(tuple(t.shape), t.dtype) for t in stored.values()] == [(s.shape, s.dtype) for s in table_tensors(9, 32)]
    error = (dequantize_rows(*stored.values(), torch.float32) - table.float()).abs()
    largest = table.float().abs().amax(1, keepdim=True)
    assert bool((error <= largest / 254 * (1 + 2**-8)).all())  # 2^-8: the scales are rounded to bfloat16
    assert not error[2].any()


def test_long_tables_are_rounded_in_parts():
    table = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0))
    whole = quantize_table(table)
    for rows in (slice(0, 10), slice(8190, 8200), slice(-10, None)):
        assert all(same_bits(whole[name][rows], part) for name, part in quantize_table(table[rows]).items())


def test_the_config_says_which_tables(tmp_path):
    found = FORM.to_config()
    assert found["int8_embeddings"] == [TABLE]
    form = detect(found)
    assert form == FORM and form.scheme_of(TABLE) is None and form.scheme_of(UP) is FORM.scheme
    assert "int8_embeddings" not in Sparse24Format(SCHEMES["bf16"]).to_config()
    with pytest.raises(FormatError, match="int8_embeddings must be a list of module names"):
        detect(found | {"int8_embeddings": "int8"})


def test_conversion_keeps_a_table_or_restores_it(tmp_path):
    source = native(tmp_path / "in")
    convert(source, tmp_path / "same")
    convert(source, tmp_path / "dense", to="dense")
    before, same, dense = (Checkpoint(tmp_path / name) for name in ("in", "same", "dense"))
    assert same.config == before.config and set(same.tensors) == set(before.tensors)
    assert all(same_bits(same.load(name), before.load(name)) for name in before.tensors)
    restored = dense.load(f"{TABLE}.weight")
    assert f"{TABLE}.weight_scale" not in dense.tensors and restored.dtype == torch.bfloat16
    assert same_bits(restored, dequantize_rows(*quantize_table(random_table()).values(), torch.bfloat16))
    assert dense.config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_inspect_shows_the_table(tmp_path, capsys):
    assert main(["inspect", str(native(tmp_path / "in"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"embeddings {TABLE}: 9 x 32 in int8, 0.00 MB"
    assert not any(line.startswith(TABLE) for line in lines)


BAD_SCALES = {"zero": 0.0, "nan": float("nan"), "inf": float("inf"), "negative": -1.0}
SCALES = torch.ones(9, 1, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"weight_scale": SCALES.index_fill(0, torch.tensor([1, 4]), bad)}, "2 scales are not finite and greater")
            for bad in BAD_SCALES.values()
        ),
        ({"weight_scale": None}, "tensor weight_scale is missing"),
        ({"weight": None}, "tensor weight is missing"),
        ({"weight_scale": SCALES[:8]}, "expected weight_scale to be torch.bfloat16 [9, 1], got torch.bfloat16 [8, 1]"),
        ({"weight_scale": SCALES[:, 0]}, "expected weight_scale to be torch.bfloat16 [9, 1], got torch.bfloat16 [9]"),
        ({"weight_scale": SCALES.float()}, "expected weight_scale to be torch.bfloat16 [9, 1], got torch.float32"),
        ({"weight": random_table()}, "expected weight to be torch.int8 [9, 32], got torch.bfloat16 [9, 32]"),
        ({"weight": torch.ones(9, dtype=torch.int8)}, "expected weight to be a matrix, got shape [9]"),
        ({"bias": SCALES}, "has an unexpected tensor bias"),
    ],
)
@pytest.mark.parametrize("to", ["dense", "sparse24"])
def test_a_wrong_table_is_refused(tmp_path, changes, message, to):
    source = native(tmp_path / "in", changes)
    with pytest.raises(FormatError) as error:
        convert(source, tmp_path / "out", to=to)
    assert str(error.value).startswith(f"{source / 'model.safetensors'}: {TABLE}: {message}")
    assert not (tmp_path / "out").exists()


def test_inspect_refuses_a_wrong_table(tmp_path, capsys):
    source = native(tmp_path / "in", {"weight_scale": SCALES[:8]})
    assert main(["inspect", str(source)]) == 2
    assert f"{source / 'model.safetensors'}: {TABLE}: expected weight_scale" in capsys.readouterr().err


def test_a_table_that_is_not_stored_is_named(tmp_path):
    source = native(tmp_path / "in", {"weight": None, "weight_scale": None})
    with pytest.raises(FormatError) as error:
        convert(source, tmp_path / "out")
    assert str(error.value) == f"{source / 'config.json'}: int8_embeddings has '{TABLE}', which is not stored"
