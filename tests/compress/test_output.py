"""Other patterns, and dense output: what is written loads without this package and holds the same numbers."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.compress.conftest import config_of, make_model
from vllm_sparse.compress import compress
from vllm_sparse.compress.evaluate import load_dense, negative_log_likelihood
from vllm_sparse.compress.hessian import damp
from vllm_sparse.compress.output import DenseWeight
from vllm_sparse.compress.pattern import Pattern
from vllm_sparse.compress.report import verify
from vllm_sparse.compress.sparsegpt import sparsegpt
from vllm_sparse.errors import FormatError, NotSparseError, OptionError, OutputError
from vllm_sparse.formats import claims, detect
from vllm_sparse.formats.checkpoint import Checkpoint
from vllm_sparse.formats.convert import convert
from vllm_sparse.scheme import get_scheme

SMALL = {"num_samples": 8, "seq_len": 64, "quiet": True, "device": "cpu"}
SCHEMES = ["bf16", "fp8", "int8", "w4a16", "w8a16"]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model whose every layer has a multiple of 32 input features."""
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1, tie_word_embeddings=False)


def options_of(scheme):
    return SMALL | {"scheme": scheme} | ({"group_size": 32} if scheme in ("w4a16", "w8a16") else {})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dense_output_holds_what_the_native_one_holds(model, text, tmp_path, scheme):
    report = compress(model, tmp_path / "dense", calibration=text, format="dense", **options_of(scheme))
    compress(model, tmp_path / "native", calibration=text, **options_of(scheme))
    convert(tmp_path / "native", tmp_path / "converted", to="dense")
    convert(tmp_path / "dense", tmp_path / "back")
    for one, other in (("dense", "converted"), ("back", "native")):
        first, second = Checkpoint(tmp_path / one), Checkpoint(tmp_path / other)
        assert set(first.tensors) == set(second.tensors)
        for name in first.tensors:
            assert torch.equal(as_bytes(first.load(name)), as_bytes(second.load(name)))
    assert report.verification.violations == 0 and report.verification.groups == 7680
    assert report.bytes_after == sum(info.nbytes for info in Checkpoint(tmp_path / "dense").tensors.values())
    made, converted = (config_of(tmp_path / name).get("quantization_config") for name in ("dense", "converted"))
    if scheme == "bf16":
        assert made is None and converted is None
    else:
        assert made.pop("sparsity_config") == {"format": "dense", "sparsity_structure": "2:4"} and made == converted


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "w4a16"])
def test_transformers_loads_dense_output(model, text, tmp_path, scheme):
    compress(model, tmp_path / "dense", calibration=text, format="dense", **options_of(scheme))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    found = dict(loaded.named_modules())[UP]
    checkpoint = Checkpoint(tmp_path / "dense")
    ids = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(loaded(input_ids=ids, labels=ids).loss)
    ours = float(negative_log_likelihood(load_dense(tmp_path / "dense"), ids).mean())
    assert loss == pytest.approx(ours, abs=2e-3 if scheme == "fp8" else 1e-4)  # fp8: sums in another order flip codes
    if scheme == "bf16":
        assert torch.equal(found.weight.data, checkpoint.load(f"{UP}.weight").float())


@pytest.mark.parametrize("scheme", ["fp8", "w4a16"])
def test_the_plugin_takes_quantized_dense_output_without_a_flag(model, text, tmp_path, scheme):
    compress(model, tmp_path / "dense", calibration=text, format="dense", **options_of(scheme))
    assert claims(config_of(tmp_path / "dense")["quantization_config"])
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    stock = CompressedTensorsConfig.from_config(config_of(tmp_path / "dense")["quantization_config"])
    assert stock.target_scheme_map["Linear"]["weights"].num_bits == (8 if scheme == "fp8" else 4)


def test_dense_output_resumes_and_verifies(model, text, tmp_path):
    compress(model, tmp_path / "a", calibration=text, format="dense", resume=True, **options_of("w4a16"))
    compress(model, tmp_path / "b", calibration=text, format="dense", **options_of("w4a16"))
    first, second = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    assert all(torch.equal(first.load(name), second.load(name)) for name in second.tensors)


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "0.6"])
@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_patterns(model, text, tmp_path, pattern, pruner):
    rule, options = Pattern.parse(pattern), options_of("bf16") | {"pattern": pattern, "pruner": pruner}
    report = compress(model, tmp_path / "out", calibration=text, format="dense", **options)
    checkpoint = Checkpoint(tmp_path / "out")
    weights = [checkpoint.load(f"{layer.name}.weight") for layer in report.layers]
    assert all(rule.violations(weight) == 0 for weight in weights)
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert rule.pruned <= zeros < rule.pruned + 0.02
    assert report.verification.zeros == pytest.approx(zeros)
    assert f"pruned to {pattern}," in (tmp_path / "out/README.md").read_text()
    if pruner in ("sparsegpt", "admm"):
        assert all(layer.optimum_ratio < 1.2 for layer in report.layers)


@pytest.mark.parametrize("scheme", ["int8", "w4a16"])
@pytest.mark.parametrize("quantizer", ["gptq", "joint"])
def test_patterns_survive_quantization(model, text, tmp_path, scheme, quantizer):
    options = options_of(scheme) | {"pattern": "4:8", "pruner": "sparsegpt", "quantizer": quantizer}
    report = compress(model, tmp_path / "out", calibration=text, format="dense", **options)
    assert report.verification.violations == 0 and 0.5 <= report.verification.zeros < 0.6
    config = config_of(tmp_path / "out")["quantization_config"]
    assert "sparsity_config" not in config and not claims(config)


def test_one_of_four_is_two_of_four(model, text, tmp_path):
    compress(model, tmp_path / "out", calibration=text, pattern="1:4", **options_of("int8"))
    checkpoint = Checkpoint(tmp_path / "out")
    form = detect(checkpoint.config["quantization_config"])
    names = [name for name in checkpoint.tensors if name.startswith(f"{UP}.")]
    weight = form.to_weight(UP, {name.rpartition(".")[2]: checkpoint.load(name) for name in names}).to_dense()
    assert int((weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) == 1


def test_fewer_kept_weights_mean_a_larger_error(model, text, tmp_path):
    errors = []
    for pattern in ("0.4", "4:8", "2:4", "1:4"):
        options = options_of("bf16") | {"pattern": pattern, "format": "dense"}
        report = compress(model, tmp_path / pattern.replace(":", "-"), calibration=text, **options)
        errors.append(report.layers[0].error)
    assert errors == sorted(errors)


def test_sparsegpt_prunes_as_few_as_the_pattern_asks_and_a_share_by_blocks():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 64, generator=generator), torch.randn(300, 64, generator=generator)
    factor = damp(x.T @ x / 300).factor
    for block in (8, 32):  # N:M does not depend on it
        pruned, mask = sparsegpt(weight, factor, block=block, pattern=Pattern.parse("4:8"))
        assert torch.equal(mask.unflatten(1, (-1, 8)).sum(-1), torch.full((16, 8), 4)) and not pruned[~mask].any()
    _, mask = sparsegpt(weight, factor, block=32, pattern=Pattern.parse("0.7"))
    assert [int((~part).sum()) for part in mask.split(32, 1)] == [359, 359]  # 0.7 of 512, rounded up


def test_masks_of_patterns():
    scores = torch.tensor([[1.0, 4, 3, 3, 9, 9, 9, 9]])
    assert Pattern.parse("1:4").mask(scores).int().tolist() == [[0, 1, 0, 0, 1, 0, 0, 0]]
    assert Pattern.parse("2:4").mask(scores).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert Pattern.parse("4:8").mask(scores).int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert Pattern.parse("0.75").mask(scores).int().tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("text_", ["2", "3:5", "4:4", "0:4", "1.5", "0.0", "2:4:8", "64:128", ""])
def test_what_is_no_pattern_is_refused(text_):
    with pytest.raises(OptionError, match=r"unknown pattern .*: expected N:M, N kept of every M = 4, 8, 16 or 32"):
        Pattern.parse(text_)


def test_patterns_that_do_not_fit(model, text, tmp_path):
    with pytest.raises(OptionError, match="pattern 4:8 is not 2:4 and can only be written with format dense"):
        compress(model, tmp_path / "out", calibration=text, pattern="4:8", **SMALL)
    with pytest.raises(OptionError, match="unknown format 'gguf': expected one of sparse24, dense"):
        compress(model, tmp_path / "out", calibration=text, format="gguf", **SMALL)
    with pytest.raises(NotSparseError, match=r"q_proj: .* groups have more than 4 non-zeros"):
        options = options_of("bf16") | {"pruner": "none", "pattern": "4:8", "format": "dense"}
        compress(model, tmp_path / "out", **options)
    odd = make_model(tmp_path / "odd", intermediate_size=92, num_hidden_layers=1)
    for options, what in (({"scheme": "bf16", "pattern": "4:8"}, "4:8"), ({"group_size": -1}, "w4a16 in format dense")):
        with pytest.raises(FormatError, match=f"down_proj: {what} needs a multiple of 8 input features, got 92"):
            compress(odd, tmp_path / "out", calibration=text, format="dense", **SMALL, **options)


@pytest.mark.parametrize("format_", ["sparse24", "dense"])
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_static_activations(model, text, tmp_path, scheme, format_):
    options = options_of(scheme) | {"activation": "static", "format": format_}
    compress(model, tmp_path / "out", calibration=text, **options)
    checkpoint = Checkpoint(tmp_path / "out")
    scales = {name: checkpoint.load(name) for name in checkpoint.tensors if name.endswith("input_scale")}
    assert len(scales) == 7 and all(scale.shape == (1,) and float(scale) > 0 for scale in scales.values())
    shared = [float(scales[f"model.layers.0.self_attn.{part}_proj.input_scale"]) for part in "qkv"]
    assert len(set(shared)) == 1  # one kernel call serves them all
    # The input of the first layer is what the norm makes of the embeddings, in the dense model too.
    from vllm_sparse.compress.calibration import load_calibration
    from vllm_sparse.compress.job import _tokenizer

    (tokens,) = load_calibration(text, _tokenizer(model), 8, 64, 0).batches(8 * 64)
    dense, seen = load_dense(model), []
    dense.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    negative_log_likelihood(dense, tokens, batch=8)
    assert shared[0] * (448 if scheme == "fp8" else 127) == pytest.approx(float(seen[0]), rel=0.02)  # bf16 and float32
    assert detect(checkpoint.config["quantization_config"]).scheme_of(UP).name == scheme
    ids = torch.randint(257, (2, 50), generator=torch.Generator().manual_seed(0))
    static = negative_log_likelihood(load_dense(tmp_path / "out"), ids)
    compress(model, tmp_path / "dynamic", calibration=text, **options_of(scheme))
    dynamic = negative_log_likelihood(load_dense(tmp_path / "dynamic"), ids)
    assert torch.allclose(static, dynamic, atol=0.05) and not torch.equal(static, dynamic)


def test_static_activations_need_a_scheme_that_has_them(model, text, tmp_path):
    with pytest.raises(
        OptionError, match="activation static does not fit scheme w4a16, which does not quantize activations"
    ):
        compress(model, tmp_path / "out", calibration=text, activation="static", **SMALL)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2:4", "8 of 8 written groups of 4 are not 2:4; nothing was kept"),
        ("0.5", "only 0 of 32 written weights are zero, not 50.0%; nothing was kept"),
    ],
)
def test_what_is_written_and_not_pruned_is_an_error(tmp_path, pattern, message):
    class Plain:
        def read(self, layer, tensors):
            return DenseWeight(get_scheme("bf16"), tensors["weight"])

    tensors = {"up.weight": torch.ones(4, 8).bfloat16(), "up.bias": torch.ones(4), "upper.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(OutputError, match=message):
        verify(tmp_path, Plain(), Pattern.parse(pattern), ["up"])
