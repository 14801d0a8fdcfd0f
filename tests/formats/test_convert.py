"""``vllm-sparse convert``: every golden format into the native and the dense one, bit by bit, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.formats.checkpoints import write_checkpoint, write_raw
from tests.formats.encoders import bitmask_of, encode, encode_legacy
from tests.formats.golden import CASES, FOLDER, config, layer
from tests.formats.weights import random_weight, same_bits, same_weight
from vllm_sparse.cli import main
from vllm_sparse.errors import FormatError, OutputError
from vllm_sparse.formats import detect
from vllm_sparse.formats.checkpoint import Checkpoint
from vllm_sparse.formats.convert import convert, quantization_config
from vllm_sparse.formats.sparse24 import Sparse24Format
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight

MODULE = "model.layers.0.mlp.up_proj"
OTHERS = {
    "model.embed_tokens.weight": torch.arange(32, dtype=torch.bfloat16).reshape(4, 8),
    "model.norm.weight": torch.ones(8, dtype=torch.bfloat16),
    "lm_head.weight": torch.arange(32, dtype=torch.bfloat16).reshape(4, 8) + 1,
    f"{MODULE}.bias": torch.ones(4, dtype=torch.bfloat16),
}
SPARSE = [case for case in CASES if case.two_of_four]


def golden_checkpoint(path, case):
    tensors = load_file(FOLDER / f"{case.name}.safetensors")
    named = {f"{MODULE}.{name}": tensor for name, tensor in tensors.items()}
    write_checkpoint(path, named | OTHERS, config(case))
    (path / "tokenizer.json").write_text("words")
    return path


def read_layer(path):
    """Return the hub weight of a checkpoint's one layer, and its config."""
    with Checkpoint(path) as checkpoint:
        form = detect(quantization_config(checkpoint.config))
        prefix = f"{MODULE}."
        names = [name for name in checkpoint.tensors if name.startswith(prefix) and not name.endswith("bias")]
        tensors = {name.removeprefix(prefix): checkpoint.load(name) for name in names}
        assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in OTHERS.items())
        return form.to_weight(MODULE, tensors), checkpoint.config


def same_values(a, b):
    """Return whether two weights stand for the same numbers, scale for scale."""
    same_scales = a.scales is b.scales or torch.equal(a.scales.double(), b.scales.double())
    same_codes = same_bits(a.to_dense_codes(), b.to_dense_codes())
    return a.scheme is b.scheme and a.group_size == b.group_size and same_codes and same_scales


@pytest.mark.parametrize("case", SPARSE, ids=lambda case: case.name)
def test_every_format_converts_to_the_native_one(tmp_path, case):
    source = golden_checkpoint(tmp_path / "in", case)
    before, _ = read_layer(source)
    summary = convert(source, tmp_path / "out")
    assert (summary.sparse, summary.dense) == (1, ["lm_head"])
    after, written = read_layer(tmp_path / "out")
    assert same_weight(after, before) or same_values(after, before)
    assert written["quantization_config"]["quant_method"] == "sparse24"
    assert written["quantization_config"]["ignore"] == ["lm_head"]
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "words"


@pytest.mark.parametrize("case", SPARSE, ids=lambda case: case.name)
def test_every_format_converts_to_a_dense_one(tmp_path, case):
    source = golden_checkpoint(tmp_path / "in", case)
    before, _ = read_layer(source)
    convert(source, tmp_path / "out", to="dense")
    after, written = read_layer(tmp_path / "out")
    made = layer(case)
    assert same_values(after, before)
    quantization = written.get("quantization_config")
    if case.bits == 16:
        assert quantization is None
        with Checkpoint(tmp_path / "out") as checkpoint:
            assert same_bits(checkpoint.load(f"{MODULE}.weight"), made["codes"])
    else:
        assert quantization["quant_method"] == "compressed-tensors"
        assert "sparsity_config" not in quantization
        assert quantization["ignore"] == ["lm_head"]


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("static", [False, True])
def test_native_to_dense_and_back_is_the_same(tmp_path, name, static):
    scheme = SCHEMES[name]
    if static and scheme.activation is None:
        pytest.skip("the scheme does not quantize activations")
    group_size = 32 if scheme.grouped else -1
    weight = random_weight(scheme, 8, 64, 3, group_size=group_size, static_input=static)
    form = Sparse24Format(scheme, group_size=group_size, static_input=static, ignore=("lm_head",))
    tensors = {f"{MODULE}.{last}": tensor for last, tensor in form.from_weight(weight).items()}
    write_checkpoint(tmp_path / "in", tensors | OTHERS, form.to_config())
    convert(tmp_path / "in", tmp_path / "dense", to="dense")
    convert(tmp_path / "dense", tmp_path / "back")
    back, written = read_layer(tmp_path / "back")
    assert same_weight(back, weight)
    assert written["quantization_config"] == form.to_config()


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "bf16"])
def test_the_dense_config_is_one_that_compressed_tensors_reads(tmp_path, name):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = SCHEMES[name]
    form = Sparse24Format(scheme)
    tensors = {f"{MODULE}.{last}": t for last, t in form.from_weight(random_weight(scheme, 8, 64)).items()}
    write_checkpoint(tmp_path / "in", tensors | OTHERS, form.to_config())
    convert(tmp_path / "in", tmp_path / "out", to="dense")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    read = quantization.QuantizationConfig.model_validate(written)
    weights = read.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric) == (scheme.weight_bits, True)


def test_layers_that_are_not_two_of_four_stay_dense(tmp_path):
    sparse = random_weight(SCHEMES["bf16"], 4, 8).to_dense_codes()
    full = torch.ones(4, 8, dtype=torch.bfloat16)
    tensors = {"a.q_proj.weight": sparse, "a.k_proj.weight": full, "a.conv.weight": torch.ones(2, 4, 4)}
    tensors["a.router.weight"] = torch.zeros(4, 8)
    write_checkpoint(tmp_path / "in", tensors | OTHERS)
    summary = convert(tmp_path / "in", tmp_path / "out")
    assert (summary.sparse, sorted(summary.dense)) == (1, ["a.k_proj", "a.router", "lm_head"])
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.config["quantization_config"]["ignore"] == ["a.k_proj", "a.router", "lm_head"]
        assert torch.equal(checkpoint.load("a.k_proj.weight"), full)
        assert "a.q_proj.weight_packed" in checkpoint.tensors
        assert checkpoint.load("a.conv.weight").shape == (2, 4, 4)


def test_a_legacy_bitmask_may_hold_embeddings_and_dense_layers(tmp_path):
    case = next(case for case in CASES if case.name == "legacy-bf16-unstructured")
    made = layer(case)["codes"]
    tensors = {f"{MODULE}.{last}": tensor for last, tensor in encode_legacy(made).items()}
    embedding = OTHERS["model.embed_tokens.weight"]
    tensors |= {f"model.embed_tokens.weight.{last}": tensor for last, tensor in encode_legacy(embedding).items()}
    sparse = random_weight(SCHEMES["bf16"], 4, 16).to_dense_codes()
    tensors |= {f"model.q_proj.weight.{last}": tensor for last, tensor in encode_legacy(sparse).items()}
    quantization = config(case)
    quantization["sparsity_config"]["ignore"] = []
    write_checkpoint(tmp_path / "in", tensors, quantization)
    for to in ("sparse24", "dense"):
        summary = convert(tmp_path / "in", tmp_path / to, to=to)
        assert summary.dense == [MODULE] or to == "dense"
        with Checkpoint(tmp_path / to) as checkpoint:
            assert torch.equal(checkpoint.load(f"{MODULE}.weight"), made)
            assert torch.equal(checkpoint.load("model.embed_tokens.weight"), embedding)
            assert ("model.q_proj.weight_packed" in checkpoint.tensors) == (to == "sparse24")
            assert "quantization_config" not in checkpoint.config or to == "sparse24"


def test_gptq_marlin_is_read_under_its_own_names(tmp_path):
    case = next(case for case in CASES if case.name == "marlin-4bit-g128-k384")
    tensors = load_file(FOLDER / f"{case.name}.safetensors")
    names = {"weight_packed": "B_24", "meta": "B_meta", "scale_packed": "s"}
    named = {f"{MODULE}.{names[name]}": tensor for name, tensor in tensors.items()}
    gptq = {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": 4, "group_size": 128, "sym": True}
    write_checkpoint(tmp_path / "in", named | OTHERS, gptq | {"desc_act": False})
    (tmp_path / "in" / "quantize_config.json").write_text("{}")
    assert convert(tmp_path / "in", tmp_path / "out").sparse == 1
    weight, written = read_layer(tmp_path / "out")
    assert same_bits(weight.to_dense_codes(), layer(case)["codes"])
    assert torch.equal(weight.scales, layer(case)["scales"])
    assert written["quantization_config"]["scale_dtype"] == "float16"
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_a_refused_dense_checkpoint_is_cleaned(tmp_path):
    case = next(case for case in CASES if case.name == "packed-4bit-g32")
    source = golden_checkpoint(tmp_path / "in", case)
    refused = config(case)
    refused["sparsity_config"] = {"format": "dense", "sparsity_structure": "unstructured", "targets": ["Linear"]}
    (source / "config.json").write_text(json.dumps({"quantization_config": refused}))
    convert(source, tmp_path / "out", to="dense")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"quantization_config": config(case)}
    with pytest.raises(FormatError, match="is quantized in a way that the native format cannot hold; use --to dense"):
        convert(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def bitmask_checkpoint(path, changed=None, quantization=None):
    weight = random_weight(SCHEMES["bf16"], 4, 16)
    tensors = {
        "shape": torch.tensor([[4], [16]]),
        "compressed": weight.values,
        "bitmask": bitmask_of(weight.to_dense_codes(), weight),
    } | (changed or {})
    case = next(case for case in CASES if case.name == "bitmask-bf16")
    named = {f"{MODULE}.{last}": tensor for last, tensor in tensors.items() if tensor is not None}
    return write_checkpoint(path, named | OTHERS, quantization or config(case))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": torch.tensor([[4], [32]])}, r"shape says \[4, 32\], the tensors \[4, 16\]"),
        ({"shape": torch.tensor([4.0, 16.0])}, "expected shape to hold 2 integers"),
        ({"shape": torch.tensor([1 << 40, 1 << 40])}, "shape says"),
        ({"bitmask": torch.zeros(4, 2, dtype=torch.uint8)}, "of 16 groups of four does not mark exactly two entries"),
        ({"bitmask": torch.full((4, 2), 0xF3, dtype=torch.uint8)}, "does not mark exactly two entries"),
        ({"bitmask": None}, "tensor bitmask is missing"),
        ({"bitmask": torch.zeros(2, 4, dtype=torch.uint8)}, r"expected bitmask to be torch.uint8 \[4, 2\], got"),
        ({"compressed": torch.ones(4, 8, dtype=torch.int8)}, "expected compressed to be torch.bfloat16"),
        ({"compressed": torch.ones(32, dtype=torch.bfloat16)}, r"expected compressed to be a matrix, got shape \[32\]"),
        ({"compressed": torch.full((4, 8), float("nan"), dtype=torch.bfloat16)}, "the weight holds NaN or Inf"),
        ({"extra": torch.ones(1)}, "has an unexpected tensor extra"),
    ],
)
def test_a_layer_that_lies_is_an_error_that_names_file_and_layer(tmp_path, changed, message):
    source = bitmask_checkpoint(tmp_path / "in", changed)
    with pytest.raises(FormatError, match=rf"in/model\.safetensors: {MODULE}: .*{message}"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_without_its_main_tensor_is_not_lost(tmp_path):
    source = bitmask_checkpoint(tmp_path / "in", {"compressed": None})
    with pytest.raises(FormatError, match="has a tensor bitmask, but not the others of format sparse-24-bitmask"):
        convert(source, tmp_path / "out")


def test_two_kinds_of_layers_do_not_fit_the_native_format(tmp_path):
    form = {name: Sparse24Format(SCHEMES[name]) for name in ("fp8", "int8")}
    groups, tensors = {}, {}
    for name, kind in (("fp8", "float"), ("int8", "int")):
        weight = random_weight(SCHEMES[name], 4, 16)
        arguments = {"num_bits": 8, "type": kind, "symmetric": True}
        groups[name] = {
            "targets": [f"re:.*{name}"],
            "weights": arguments | {"strategy": "channel"},
            "input_activations": arguments | {"strategy": "token", "dynamic": True},
        }
        tensors |= {f"m.{name}.weight": weight.to_dense_codes(), f"m.{name}.weight_scale": weight.scales}
    assert len(form) == 2
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    source = write_checkpoint(tmp_path / "in", tensors, quantization)
    message = r"m.int8: is stored as int8, but m.fp8 as fp8; the native format holds one kind of layer, use --to dense"
    with pytest.raises(FormatError, match=message):
        convert(source, tmp_path / "out")


def test_a_quantized_layer_that_is_not_two_of_four_is_an_error(tmp_path):
    case = next(case for case in CASES if case.name == "quantized-int8-tensor")
    tensors = {f"{MODULE}.weight": torch.ones(4, 8, dtype=torch.int8), f"{MODULE}.weight_scale": torch.ones(1)}
    source = write_checkpoint(tmp_path / "in", tensors, config(case))
    with pytest.raises(FormatError, match="is quantized but not 2:4, which the native format cannot hold"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "dense", to="dense")


def test_zero_points_of_zero_are_dropped_and_others_refused(tmp_path):
    case = next(case for case in CASES if case.name == "quantized-int8-tensor")
    weight = random_weight(SCHEMES["int8"], 4, 8)
    tensors = {f"{MODULE}.weight": weight.to_dense_codes(), f"{MODULE}.weight_scale": torch.ones(1)}
    for value in (0, 1):
        zeros = {f"{MODULE}.weight_zero_point": torch.full((1,), value, dtype=torch.int8)}
        write_checkpoint(tmp_path / "in", tensors | zeros, config(case))
        if value:
            with pytest.raises(FormatError, match="has an unexpected tensor weight_zero_point"):
                convert(tmp_path / "in", tmp_path / "out", force=True)
        else:
            assert convert(tmp_path / "in", tmp_path / "out").sparse == 1


@pytest.mark.parametrize("static", [False, True])
def test_activations_with_a_zero_point_stay_so(tmp_path, static):
    case = next(case for case in CASES if case.name == "bitmask-int8")
    quantization = config(case)
    inputs = quantization["config_groups"]["group_0"]["input_activations"]
    inputs |= {"symmetric": False} | ({"dynamic": False, "strategy": "tensor"} if static else {})
    extra = (
        {"input_scale": torch.tensor(0.25), "input_zero_point": torch.tensor(-7, dtype=torch.int8)} if static else {}
    )
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in (encode(case, layer(case)) | extra).items()}
    source = write_checkpoint(tmp_path / "in", tensors, quantization)
    convert(source, tmp_path / "native")
    with Checkpoint(tmp_path / "native") as native:
        form = detect(native.config["quantization_config"])
        names = [name for name in native.tensors if name.startswith(MODULE)]
        weight = form.to_weight(MODULE, {name.rpartition(".")[2]: native.load(name) for name in names})
    assert not weight.symmetric_input and (weight.input_zero is not None) == static
    assert not static or weight.input_zero.tolist() == [-7]
    convert(source, tmp_path / "dense", to="dense")
    with Checkpoint(tmp_path / "dense") as dense:
        group = dense.config["quantization_config"]["config_groups"]["group_0"]
        assert group["input_activations"]["symmetric"] is False
        assert (f"{MODULE}.input_zero_point" in dense.tensors) == static


def test_the_command_prints_what_it_did(tmp_path, capsys):
    source = golden_checkpoint(tmp_path / "in", SPARSE[0])
    assert main(["convert", str(source), "-o", str(tmp_path / "out")]) == 0
    assert f"{tmp_path}/out: 1 of 2 linear layers are 2:4, written as sparse24" in capsys.readouterr().out
    assert main(["convert", str(source), "-o", str(tmp_path / "out")]) == 2
    assert "the output directory is not empty; use --force to replace it" in capsys.readouterr().err
    assert main(["convert", str(source), "-o", str(tmp_path / "out"), "--force"]) == 0
    assert main(["convert", str(source), "-o", str(source), "--force"]) == 2
    assert "in: is the source; choose another output directory" in capsys.readouterr().err


def test_what_cannot_be_converted_is_one_sentence(tmp_path):
    write_checkpoint(tmp_path / "awq", OTHERS, {"quant_method": "awq"})
    with pytest.raises(FormatError, match=r"config.json: quant_method 'awq', format None is none of the formats"):
        convert(tmp_path / "awq", tmp_path / "out")
    write_checkpoint(tmp_path / "dense", OTHERS)
    with pytest.raises(
        FormatError, match="dense: none of its linear layers is 2:4 in a scheme that the native format has"
    ):
        convert(tmp_path / "dense", tmp_path / "out")
    write_raw(tmp_path / "dense" / "model.safetensors", b"{")
    with pytest.raises(FormatError, match=r"model.safetensors: truncated or not a safetensors file"):
        convert(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    source = golden_checkpoint(tmp_path / "in", SPARSE[0])
    monkeypatch.setattr("vllm_sparse.formats.checkpoint.save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_weights_of_every_file_are_kept_apart(tmp_path):
    weight = random_weight(SCHEMES["bf16"], 4, 8)
    assert isinstance(weight, Sparse24Weight)
    write_checkpoint(tmp_path / "in", {"q.weight": weight.to_dense_codes()})
    (tmp_path / "in" / "consolidated.safetensors").write_bytes((tmp_path / "in" / "model.safetensors").read_bytes())
    assert convert(tmp_path / "in", tmp_path / "out").sparse == 1


def test_two_names_of_one_tensor_are_an_error(tmp_path):
    source = bitmask_checkpoint(tmp_path / "in", {"weight.bitmask": torch.zeros(4, 2, dtype=torch.uint8)})
    with pytest.raises(FormatError, match=r"in: '.*bitmask' and '.*bitmask' are two names of one tensor"):
        convert(source, tmp_path / "out")


def test_a_quantized_layer_that_was_not_compressed_goes_along_to_dense(tmp_path):
    case = next(case for case in CASES if case.name == "bitmask-int8")
    found = config(case)
    found["sparsity_config"]["ignore"] = ["lm_head", "a.down_proj"]
    tensors = load_file(FOLDER / f"{case.name}.safetensors")
    named = {f"{MODULE}.{last}": tensor for last, tensor in tensors.items()}
    dense = {"a.down_proj.weight": torch.ones(4, 8, dtype=torch.int8), "a.down_proj.weight_scale": torch.ones(4, 1)}
    write_checkpoint(tmp_path / "in", named | dense | OTHERS, found)
    convert(tmp_path / "in", tmp_path / "out", to="dense")
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert "sparsity_config" not in checkpoint.config["quantization_config"]
        assert checkpoint.config["quantization_config"]["ignore"] == ["lm_head"]
        assert same_bits(checkpoint.load(f"{MODULE}.weight"), layer(case)["codes"])
        assert f"{MODULE}.shape" not in checkpoint.tensors
        assert torch.equal(checkpoint.load("a.down_proj.weight"), dense["a.down_proj.weight"])
    with pytest.raises(FormatError, match=r"a.down_proj: is quantized in a way that the native format cannot hold"):
        convert(tmp_path / "in", tmp_path / "native")
