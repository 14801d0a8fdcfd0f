"""Experts: taken apart they compute what transformers computes, and a compressed mixture is the model served."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from tests.compress.conftest import config_of, make_model
from vllm_sparse.compress import compress
from vllm_sparse.compress.evaluate import load_dense, negative_log_likelihood
from vllm_sparse.compress.experts import LinearExperts
from vllm_sparse.compress.model import BlockModel
from vllm_sparse.compress.pipeline import dry_run
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.formats.checkpoint import Checkpoint

SMALL = {"num_samples": 8, "seq_len": 64, "quiet": True, "device": "cpu"}
SIZES = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "head_dim": 16,
}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
}
EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2",
    "qwen3_moe": "model.layers.1.mlp.experts.3.down_proj",
    "qwen2_moe": "model.layers.1.mlp.experts.3.down_proj",
}
LAYERS = {"mixtral": 2 * (4 + 4 * 3), "qwen3_moe": 2 * (4 + 6 * 3), "qwen2_moe": 2 * (4 + 4 * 3 + 3)}


@pytest.fixture(scope="module", params=CONFIGS)
def mixture(request, tmp_path_factory):
    """Return the kind of a mixture and where it is."""
    return request.param, make_model(tmp_path_factory.mktemp(request.param), config=CONFIGS[request.param])


def pack(model, out):
    """Write ``model`` again as transformers holds it: all experts of a projection in one tensor."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    out.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in whole.state_dict().items()}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_compute_what_transformers_computes(mixture, tmp_path, packed):
    _, path = mixture
    path = pack(path, tmp_path / "packed") if packed else path
    ids = torch.randint(257, (3, 40), generator=torch.Generator().manual_seed(0))
    model = BlockModel(Checkpoint(path), torch.device("cpu"), torch.float32)
    assert any(isinstance(module, LinearExperts) for module in model.blocks[0].modules())
    hidden, calls = model.embed(ids)
    with torch.no_grad():
        for index, call in enumerate(calls):
            hidden = call.run(model.load(index), hidden)
        whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        last = []
        whole.get_submodule(model.prefix)[-1].register_forward_hook(lambda module, args, output: last.append(output))
        loss = whole(input_ids=ids, labels=ids).loss
    output = last[0][0] if isinstance(last[0], tuple) else last[0]
    assert torch.allclose(hidden, output, atol=1e-5)
    assert float(negative_log_likelihood(load_dense(path), ids).mean()) == pytest.approx(float(loss), abs=1e-4)


def test_a_mixture_is_compressed_expert_by_expert(mixture, text, tmp_path):
    kind, path = mixture
    report = compress(path, tmp_path / "out", calibration=text, group_size=32, **SMALL)
    assert len(report.layers) == LAYERS[kind] and report.verification.violations == 0
    tensors = Checkpoint(tmp_path / "out").tensors
    assert f"{EXPERT[kind]}.weight_packed" in tensors and f"{EXPERT[kind]}.weight" not in tensors
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    gates = [EXPERT[kind].partition(".experts")[0] + ".gate", "lm_head"]
    assert set(gates) <= set(ignored) and all(f"{name}.weight" in tensors for name in gates)
    if kind == "qwen2_moe":
        assert "model.layers.1.mlp.shared_expert_gate" in ignored
    # Every token goes to two experts, and the report counts them.
    routed = [
        layer for layer in report.layers if "layers.0." in layer.name and layer.name.endswith(("w1", ".gate_proj"))
    ]
    routed = [layer.tokens for layer in routed if ".experts." in layer.name]
    assert sum(routed) == 2 * 8 * 64 and len(set(routed)) > 1
    down = {layer.name: layer.tokens for layer in report.layers}
    assert all(
        down[layer.name.replace("up_proj", "down_proj").replace("w3", "w2")] == layer.tokens for layer in report.layers
    )


def test_packed_and_separate_experts_give_the_same(mixture, text, tmp_path):
    kind, path = mixture
    if kind == "mixtral":
        pytest.skip("a packed Mixtral also has other names outside its experts")
    ignore = {"ignore": ["re:.*layers.0.mlp.experts"]}
    compress(path, tmp_path / "a", calibration=text, group_size=32, **SMALL, **ignore)
    packed = pack(path, tmp_path / "packed")
    compress(packed, tmp_path / "b", calibration=text, group_size=32, **SMALL, **ignore)
    a, b = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    assert set(a.tensors) == set(b.tensors)
    assert all(torch.equal(a.load(name), b.load(name)) for name in a.tensors)
    plan = dry_run(
        packed, tmp_path / "c", calibration=text, group_size=32, device="cpu", num_samples=8, seq_len=64, **ignore
    )
    assert plan.bytes_after == sum(info.nbytes for info in b.tensors.values())


def starve(model):
    """Send nearly no token to expert 3 and none to expert 2 of the first block."""
    with torch.no_grad():
        gate = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.gate"))
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = embeddings.abs().amax() * 4  # always positive after the norm
        gate.weight[:2, 0] += 4
        gate.weight[2:, 0] -= 4


def test_experts_without_tokens_are_reported(text, tmp_path):
    make_model(tmp_path / "model", config=CONFIGS["mixtral"], edit=starve)
    report = compress(tmp_path / "model", tmp_path / "out", calibration=text, scheme="int8", **SMALL)
    notes = {layer.name: (layer.tokens, layer.note) for layer in report.layers}
    none = "no calibration token reached it: pruned by magnitude, rounded to nearest"
    for expert in (2, 3):
        for name in ("w1", "w2", "w3"):
            assert notes[f"model.layers.0.mlp.experts.{expert}.{name}"] == (0, none)
    assert notes["model.layers.0.mlp.experts.0.w1"] == (512, "")
    assert none in (tmp_path / "out/README.md").read_text()


def test_an_expert_with_one_token_is_pruned_and_reported(tmp_path):
    make_model(tmp_path / "model", config=CONFIGS["qwen3_moe"])
    tokens = torch.randint(257, (1, 3), generator=torch.Generator().manual_seed(0))  # six places for six experts
    report = compress(tmp_path / "model", tmp_path / "out", calibration=tokens, group_size=32, quiet=True, device="cpu")
    single = [layer for layer in report.layers if layer.tokens == 1]
    assert single and all("only 1 calibration tokens for" in layer.note for layer in single)
    assert all(layer.error < 0.5 and layer.error == layer.error for layer in single)


def test_other_layouts_are_refused(text, tmp_path):
    config = GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    make_model(tmp_path / "model", config=config)
    message = r"model.layers.0.mlp.experts holds all experts in one tensor, with biases or in a layout that cannot"
    with pytest.raises(UnsupportedError, match=message):
        compress(tmp_path / "model", tmp_path / "out", calibration=text, **SMALL)


@pytest.mark.parametrize("steps", [3])
def test_a_mixture_can_be_refined(text, tmp_path, steps):
    make_model(tmp_path / "model", config=CONFIGS["mixtral"])
    report = compress(tmp_path / "model", tmp_path / "out", calibration=text, scheme="bf16", refine=steps, **SMALL)
    assert report.verification.violations == 0
