"""Any module tree with repeated blocks of nn.Linear: nothing in the package knows one architecture from another."""

import pytest
import torch
import transformers
from transformers import AutoConfig

from tests.compress.conftest import config_of, make_model, save_tokenizer
from tests.compress.test_experts import CONFIGS
from vllm_sparse.compress import compress
from vllm_sparse.compress.model import BlockModel
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.formats.checkpoint import Checkpoint

SIZES = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
# Linear layers in two blocks, and what the model's class is called where it is not "…ForCausalLM".
MODELS = {
    "llama": (14, {}),
    "qwen2": (14, {}),
    "qwen3": (14, {}),
    "mistral": (14, {}),
    "gemma": (14, {}),
    "gemma2": (14, {"sliding_window": 16}),
    "gemma3_text": (14, {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": (12, {}),
    "phi3": (8, {}),
    "opt": (12, {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_neox": (8, {}),
    "bert": (12, {}),
    "roberta": (12, {"max_position_embeddings": 258}),
}
ENCODERS = {"bert": "BertModel", "roberta": "RobertaForMaskedLM"}


def save(path, kind):
    config = AutoConfig.for_model(kind, **(SIZES | MODELS[kind][1]))
    if kind not in ENCODERS:
        return make_model(path, config=config)
    torch.manual_seed(0)
    getattr(transformers, ENCODERS[kind])(config).to(torch.bfloat16).save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_an_architecture_is_compressed(kind, text, tmp_path):
    path = save(tmp_path / "model", kind)
    options = {"num_samples": 4, "seq_len": 64, "quiet": True, "device": "cpu", "iterations": 5}
    report = compress(path, tmp_path / "out", calibration=text, scheme="int8", **options)
    assert report.verification.violations == 0 and len(report.layers) == MODELS[kind][0]
    assert all(0 < layer.error < 0.9 and layer.tokens == 256 for layer in report.layers)
    before, after = Checkpoint(path), Checkpoint(tmp_path / "out")
    compressed = {name.removesuffix("_packed") for name in after.tensors if name.endswith("weight_packed")}
    assert len(compressed) == MODELS[kind][0] and compressed <= set(before.tensors)
    tied = {"lm_head.weight"} if after.config.get("tie_word_embeddings") else set()
    assert set(before.tensors) - compressed - tied <= set(after.tensors)
    dense = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert {f"{name}.weight" for name in dense} & set(before.tensors) <= set(after.tensors)


@pytest.mark.parametrize("kind", ["gemma2", "opt", "gpt_neox", "roberta", "qwen3_moe"])
def test_its_outputs_are_weighed_together(kind, text, tmp_path):
    moe = kind in CONFIGS
    path = make_model(tmp_path / "model", config=CONFIGS[kind]) if moe else save(tmp_path / "model", kind)
    options = {"num_samples": 4, "seq_len": 64, "quiet": True, "device": "cpu", "scheme": "int8"}
    report = compress(path, tmp_path / "out", calibration=text, curvature=4, **options)
    alone = compress(path, tmp_path / "alone", calibration=text, **options)
    assert report.verification.violations == 0 and len(report.layers) == len(alone.layers)
    # What is best for all outputs together is worse for each alone.
    assert sum(layer.error for layer in report.layers) > sum(layer.error for layer in alone.layers)


def test_curvature_needs_a_head(text, tmp_path):
    with pytest.raises(UnsupportedError, match="has no head that predicts tokens, which curvature needs"):
        compress(
            save(tmp_path / "model", "bert"), tmp_path / "out", calibration=text, curvature=1, seq_len=64, scheme="int8"
        )


@pytest.mark.parametrize("kind", MODELS)
def test_its_blocks_compute_what_transformers_computes(kind, tmp_path):
    path = save(tmp_path / "model", kind)
    ids = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    model = BlockModel(Checkpoint(path), torch.device("cpu"), torch.float32)
    kind_of_model = getattr(transformers, config_of(path)["architectures"][0])
    whole = kind_of_model.from_pretrained(path, dtype=torch.float32).eval()
    last = []
    whole.get_submodule(model.prefix)[-1].register_forward_hook(lambda module, args, output: last.append(output))
    with torch.no_grad():
        hidden, calls = model.embed(ids)
        for index, call in enumerate(calls):
            hidden = call.run(model.load(index), hidden)
        whole(input_ids=ids)
    output = last[0][0] if isinstance(last[0], tuple) else last[0]
    assert torch.allclose(hidden, output, atol=1e-5)
