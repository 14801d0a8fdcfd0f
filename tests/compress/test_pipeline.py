"""Whole runs on a tiny model: what is written, that it is 2:4, and that a run cut short leaves nothing."""

import json
import signal
import time
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, Qwen2Config

from tests.compress.conftest import config_of, make_model, run_and_kill
from vllm_sparse.compress import compress, job
from vllm_sparse.compress.activations import Activations
from vllm_sparse.compress.cli import add_arguments, run
from vllm_sparse.compress.evaluate import load_dense, negative_log_likelihood
from vllm_sparse.formats import detect
from vllm_sparse.formats.checkpoint import Checkpoint
from vllm_sparse.weight import count_violations

SMALL = {"num_samples": 8, "seq_len": 64, "quiet": True, "device": "cpu"}


def hub_weights(path):
    """Return every 2:4 layer of a written checkpoint."""
    checkpoint = Checkpoint(path)
    form = detect(checkpoint.config["quantization_config"])
    layers = sorted({name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith("weight_packed")})
    result = {}
    for layer in layers:
        tensors = {
            name.rpartition(".")[2]: checkpoint.load(name)
            for name in checkpoint.tensors
            if name.rpartition(".")[0] == layer and not name.endswith("bias")
        }
        result[layer] = form.to_weight(layer, tensors, [])
    return result


@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int8", "w4a16", "w8a16"])
def test_every_scheme_writes_a_valid_2_4_checkpoint(tiny, text, tmp_path, scheme):
    size = {"group_size": 32} if scheme in ("w4a16", "w8a16") else {}
    report = compress(tiny, tmp_path / "out", calibration=text, scheme=scheme, **SMALL, **size)
    weights = hub_weights(tmp_path / "out")
    assert len(weights) == 14 == len(report.layers)
    assert all(count_violations(w.to_dense()) == 0 and w.scheme.name == scheme for w in weights.values())
    assert report.verification.violations == 0 and report.verification.layers == 14
    assert report.bytes_after == sum(t.nbytes for t in Checkpoint(tmp_path / "out").tensors.values())
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["ignore"] == ["lm_head"] and config["scheme"] == scheme
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_report_and_the_model_card_say_what_was_done(tiny, text, tmp_path):
    compress(tiny, tmp_path / "out", calibration=text, group_size=32, **SMALL)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["scheme"] == "w4a16" and report["recipe"]["group_size"] == 32
    assert report["calibration"]["tokens"] == 8 * 64
    layer = report["layers"][0]
    assert layer["name"] == "model.layers.0.self_attn.q_proj" and 0 < layer["error"] < 1
    assert layer["zeros"] >= 0.5 and layer["tokens"] == 8 * 64 and layer["optimum_ratio"] >= 1 - 1e-6
    card = (tmp_path / "out" / "README.md").read_text()
    assert "0 of 15360 groups of four hold more than two non-zeros" in card
    assert "| model.layers.1.mlp.down_proj | 64 x 96 |" in card


def test_what_is_not_pruned_is_copied_bit_for_bit(tiny, text, tmp_path):
    compress(tiny, tmp_path / "out", calibration=text, scheme="bf16", **SMALL)
    before, after = Checkpoint(tiny), Checkpoint(tmp_path / "out")
    for name in before.tensors:
        if "_proj" not in name:
            assert torch.equal(before.load(name), after.load(name))


def test_the_same_seed_gives_the_same_bytes(tiny, text, tmp_path):
    for name in ("a", "b"):
        compress(tiny, tmp_path / name, calibration=text, group_size=32, **SMALL)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_errors_are_ordered_dense_bf16_quantized(tiny, text, tmp_path):
    errors = {}
    for scheme in ("bf16", "w8a16", "w4a16"):
        report = compress(tiny, tmp_path / scheme, calibration=text, scheme=scheme, **SMALL, group_size=None
                          if scheme == "bf16" else 32)  # fmt: skip
        errors[scheme] = sum(layer.error for layer in report.layers)
    assert 0 < errors["bf16"] < errors["w8a16"] * 1.01 < errors["w4a16"]


def test_sparsegpt_with_least_squares_beats_sparsegpt_beats_magnitude(tiny, text, tmp_path):
    def error(name, **options):
        report = compress(tiny, tmp_path / name, calibration=text, scheme="bf16", **SMALL, **options)
        return report.layers[0].error  # the only layer whose inputs do not depend on the method

    squares, obs = error("ls"), error("obs", iterations=0)
    assert squares < obs < error("mag", pruner="wanda", iterations=0)


def test_refining_brings_the_model_closer_to_the_dense_one_and_keeps_the_mask(tiny, text, tmp_path, capsys):
    options = SMALL | {"num_samples": 64, "quiet": False}
    before = compress(tiny, tmp_path / "one-shot", calibration=text, scheme="bf16", **options)
    after = compress(tiny, tmp_path / "refined", calibration=text, scheme="bf16", refine=40, **options)
    assert before.verification.violations == after.verification.violations == 0
    assert "block 1 refined: relative squared error 0." in capsys.readouterr().err
    ids = torch.randint(257, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = load_dense(tiny)(input_ids=ids).logits
        off = [(load_dense(tmp_path / name)(input_ids=ids).logits - dense).norm() for name in ("one-shot", "refined")]
    assert off[1] < off[0]


def test_refining_comes_before_rounding(tiny, text, tmp_path):
    report = compress(tiny, tmp_path / "out", calibration=text, group_size=32, refine=3, **SMALL)
    assert report.verification.violations == 0 and report.recipe.refine == 3


def test_magnitude_and_rounding_need_no_calibration(tiny, tmp_path):
    report = compress(tiny, tmp_path / "out", pruner="magnitude", quantizer="rtn", group_size=32, **SMALL)
    assert report.calibration is None and report.verification.violations == 0
    dense = AutoModelForCausalLM.from_pretrained(tiny).model.layers[0].mlp.up_proj.weight
    kept = hub_weights(tmp_path / "out")["model.layers.0.mlp.up_proj"].to_dense() != 0
    smallest_kept = dense.abs().masked_fill(~kept, 9).unflatten(1, (-1, 4)).amin(-1)
    largest_pruned = dense.abs().masked_fill(kept, 0).unflatten(1, (-1, 4)).amax(-1)
    assert (smallest_kept >= largest_pruned).float().mean() > 0.9  # rounding to zero hides a few


def test_pruner_none_quantizes_a_2_4_model_and_refuses_another(tiny, text, tmp_path):
    def prune(model):
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.data.view(-1, 4)[:, 1::2] = 0

    make_model(tmp_path / "sparse", edit=prune)
    compress(tmp_path / "sparse", tmp_path / "out", pruner="none", scheme="bf16", **SMALL)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").model.layers[1].mlp.down_proj.weight
    assert torch.equal(hub_weights(tmp_path / "out")["model.layers.1.mlp.down_proj"].to_dense(torch.bfloat16), dense)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj: .* have more than two non-zeros"):
        compress(tiny, tmp_path / "no", pruner="none", quantizer="rtn", scheme="fp8", **SMALL)
    assert not (tmp_path / "no").exists()


def test_ignored_layers_stay_dense_and_are_listed(tiny, text, tmp_path):
    compress(
        tiny,
        tmp_path / "out",
        calibration=text,
        scheme="fp8",
        ignore=[r"re:.*\.0\.mlp\.", "model.layers.1.self_attn.q_proj"],
        **SMALL,
    )
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert set(ignored) == {
        "lm_head",
        "model.layers.1.self_attn.q_proj",
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    before, after = Checkpoint(tiny), Checkpoint(tmp_path / "out")
    for name in ignored[:-1]:
        assert torch.equal(before.load(f"{name}.weight"), after.load(f"{name}.weight"))


OTHERS = {
    "qwen2": Qwen2Config(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    ),
    "opt": OPTConfig(
        vocab_size=257, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_need_no_driver(name, text, tmp_path):
    def fill_biases(model):
        for parameter, value in model.named_parameters():
            if parameter.endswith("bias"):
                value.data.normal_()

    make_model(tmp_path / "model", config=OTHERS[name], edit=fill_biases)
    report = compress(tmp_path / "model", tmp_path / "out", calibration=text, scheme="bf16", **SMALL)
    assert report.verification.violations == 0 and len(report.layers) == {"qwen2": 14, "opt": 12}[name]
    before, after = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "out")
    biases = [n for n in before.tensors if n.endswith("bias")]
    assert biases and all(torch.equal(before.load(n), after.load(n)) for n in biases)
    assert "lm_head" in config_of(tmp_path / "out")["quantization_config"]["ignore"]


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_block_by_block_gives_what_the_whole_model_gives(name, tmp_path):
    """The hidden states after the last block, and with them all calibration, agree with transformers' own forward."""
    from vllm_sparse.compress.model import BlockModel

    make_model(tmp_path / "model", config=OTHERS.get(name))
    ids = torch.randint(257, (3, 40), generator=torch.Generator().manual_seed(0))
    model = BlockModel(Checkpoint(tmp_path / "model"), torch.device("cpu"), torch.float32)
    hidden, calls = model.embed(ids)
    with torch.no_grad():
        for index, call in enumerate(calls):
            hidden = call.run(model.load(index), hidden)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        last = []
        blocks = whole.get_submodule(model.prefix)
        blocks[-1].register_forward_hook(lambda module, args, output: last.append(output))
        whole(input_ids=ids)
    output = last[0][0] if isinstance(last[0], tuple) else last[0]
    assert torch.allclose(hidden, output, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sources_of_other_precision(dtype, text, tmp_path):
    make_model(tmp_path / "model", dtype=dtype)
    compress(tmp_path / "model", tmp_path / "out", calibration=text, scheme="bf16", **SMALL)
    wanted = torch.float16 if dtype == torch.float16 else torch.bfloat16
    floats = {info.dtype for info in Checkpoint(tmp_path / "out").tensors.values()} - {torch.uint8}
    assert floats == {wanted}
    assert config_of(tmp_path / "out")["dtype"] == str(wanted).removeprefix("torch.")


def test_the_evaluated_model_is_the_written_one(tiny, text, tmp_path):
    compress(tiny, tmp_path / "out", calibration=text, scheme="bf16", **SMALL)
    ids = torch.randint(257, (2, 50), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for name, weight in hub_weights(tmp_path / "out").items():
        dense.get_submodule(name).weight.data = weight.to_dense()
    expected = torch.stack([dense(input_ids=row[None], labels=row[None]).loss for row in ids])
    found = negative_log_likelihood(load_dense(tmp_path / "out"), ids)
    assert torch.allclose(found.float(), expected, atol=1e-4)


def test_the_command_line_writes_the_same_and_prints_progress(tiny, text, tmp_path, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    (tmp_path / "recipe.yaml").write_text("scheme: fp8\nseq_len: 64\nnum_samples: 100\n")
    arguments = f"{tiny} -o {tmp_path / 'cli'} --recipe {tmp_path / 'recipe.yaml'} --num-samples 8 --device cpu"
    assert run(parser.parse_args([*arguments.split(), "--calibration", str(text)])) == 0
    printed = capsys.readouterr()
    assert "[14/14] model.layers.1.mlp.down_proj  error 0." in printed.err and "0:00 left" in printed.err
    assert "verified after writing: 0 of 15360 groups of four in 14 layers" in printed.out
    compress(tiny, tmp_path / "python", calibration=text, scheme="fp8", **SMALL)
    assert (tmp_path / "cli/model.safetensors").read_bytes() == (tmp_path / "python/model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_under_the_final_name(tiny, text, tmp_path, number):
    run_and_kill(tiny, tmp_path / "out", text, number, after=5, options="")
    if number != signal.SIGKILL:
        assert not list(tmp_path.iterdir())


def test_time_is_not_lost_on_a_full_output(tiny, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    started = time.monotonic()
    with pytest.raises(OSError, match="the output directory is not empty; use --force to replace it"):
        compress(tiny, tmp_path / "out", calibration=text, **SMALL)
    assert time.monotonic() - started < 5 and (tmp_path / "out" / "precious").read_text() == "x"
    compress(tiny, tmp_path / "out", calibration=text, group_size=32, force=True, **SMALL)
    assert not (tmp_path / "out" / "precious").exists()


def test_no_input_of_a_block_outlives_its_output(tiny, text, tmp_path, monkeypatch):
    """A GPU holds one set of activations, which for a large model is most of its memory."""
    monkeypatch.setattr(job, "_STAGED_BYTES", -1)  # as on a GPU
    monkeypatch.setitem(job._BATCH_TOKENS, "cpu", 64)
    advance, left = Activations.advance, []

    def watched(self, index, block):
        inputs = [weakref.ref(x) for x in self._hidden]
        advance(self, index, block)
        left.append(sum(x() is not None for x in inputs))

    monkeypatch.setattr(Activations, "advance", watched)
    compress(tiny, tmp_path / "out", calibration=text, scheme="bf16", **SMALL)
    assert left == [0]
