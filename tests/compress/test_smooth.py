"""SmoothQuant: the model stays what it was, and int8 activations lose less where a few channels are large."""

import pytest
import torch
from transformers import Gemma2Config, OPTConfig

from tests.compress.conftest import make_model
from tests.compress.test_experts import CONFIGS
from vllm_sparse.compress import compress
from vllm_sparse.compress.evaluate import load_dense
from vllm_sparse.compress.model import BlockModel
from vllm_sparse.compress.smooth import smooth
from vllm_sparse.errors import OptionError
from vllm_sparse.formats.checkpoint import Checkpoint

SMALL = {"num_samples": 8, "seq_len": 64, "quiet": True, "device": "cpu"}
SIZES = {
    "vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "head_dim": 16,
}  # fmt: skip
KINDS = {
    "llama": None,
    "gemma2": Gemma2Config(**SIZES, intermediate_size=96),
    "opt": OPTConfig(
        vocab_size=257, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    ),
    "mixtral": CONFIGS["mixtral"],
}


OUTLIERS = [2, 16, 40, 42]  # pruning below leaves these inputs


def add_outliers(model):
    """Make four channels of every norm 40 times as large as the others, and every linear layer 2:4."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers." in name and "norm.weight" in name:
                if model.config.model_type == "gemma2" and ".post_" in name:
                    continue  # no linear layer reads it
                plus_one = float(parameter[0] == 0)
                parameter.copy_(torch.rand(64) + 0.5 - plus_one)
                parameter[OUTLIERS] = 40.0 - plus_one
            elif "layers." in name and parameter.dim() == 2 and "gate.weight" not in name:
                parameter.normal_(std=0.05)
                parameter.view(-1, 4)[:, 1::2] = 0
            elif "layers." in name and "norm.bias" in name:
                parameter.normal_()


@pytest.fixture(scope="module", params=KINDS)
def kind_and_model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return request.param, make_model(path, config=KINDS[request.param], edit=add_outliers)


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_a_smoothed_block_computes_the_same(kind_and_model, strength):
    kind, path = kind_and_model
    model = BlockModel(Checkpoint(path), torch.device("cpu"), torch.float32)
    ids = torch.randint(257, (4, 32), generator=torch.Generator().manual_seed(0))
    hidden, calls = model.embed(ids)
    with torch.no_grad():
        block = model.load(0)
        before = calls[0].run(block, hidden)
        linears = model.linears(0)
        inputs = {}
        hooks = [
            linear.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, args[0]))
            for name, linear in linears.items()
        ]
        calls[0].run(block, hidden)
        ratios = [spread(inputs)]
        inputs.clear()
        changed = smooth(block, f"{model.prefix}.0.", linears.values(), [(calls[0], hidden)], strength)
        inputs.clear()
        after = calls[0].run(block, hidden)
        for hook in hooks:
            hook.remove()
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    norms = {name.split(".")[-2] for name in changed if "norm" in name}
    assert (
        norms
        == {
            "llama": {"input_layernorm", "post_attention_layernorm"},
            "gemma2": {"input_layernorm", "pre_feedforward_layernorm"},
            "opt": {"self_attn_layer_norm", "final_layer_norm"},
            "mixtral": {"input_layernorm"},  # experts and a router read the other one
        }[kind]
    )
    ratios.append(spread(inputs))
    assert ratios[1] < 0.5 * ratios[0]


def spread(inputs):
    """Return the largest channel of what reaches the queries over the median one."""
    query = next(x for name, x in inputs.items() if name.endswith("q_proj")).abs().flatten(0, 1).amax(0)[::2]
    return float(query.max() / query.median())


def test_int8_loses_less(kind_and_model, tmp_path):
    kind, path = kind_and_model
    ids = torch.randint(257, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = load_dense(path)(input_ids=ids).logits
        off = []
        for strength in (0.0, 0.5):
            out = tmp_path / f"s{strength}"
            options = SMALL | {"ignore": ["re:.*experts"]}
            compress(path, out, calibration=ids, scheme="int8", pruner="none", smooth=strength, **options)
            off.append(float((load_dense(out)(input_ids=ids).logits - dense).norm() / dense.norm()))
    assert off[1] < (0.9 if kind == "mixtral" else 0.6) * off[0]


def test_what_changed_is_written_and_a_resumed_run_knows_it(kind_and_model, text, tmp_path):
    kind, path = kind_and_model
    if kind != "llama":
        pytest.skip("one architecture is enough")
    options = SMALL | {"scheme": "int8", "smooth": 0.8, "ignore": ["re:.*v_proj"]}
    compress(path, tmp_path / "a", calibration=text, **options)
    compress(path, tmp_path / "b", calibration=text, resume=True, **options)
    a, b, before = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b"), Checkpoint(path)
    assert set(a.tensors) == set(b.tensors) and all(torch.equal(a.load(name), b.load(name)) for name in a.tensors)
    for name in ("input_layernorm", "self_attn.v_proj"):
        old, new = (c.load(f"model.layers.1.{name}.weight") for c in (before, a))
        assert old.dtype == new.dtype and not torch.equal(old, new)
        ratio = (old.float() / new.float())[torch.isfinite(old.float() / new.float())]
        assert torch.equal(ratio.log2(), ratio.log2().round())  # powers of two lose nothing


def test_a_strength_out_of_range_is_refused(text, tmp_path, tiny):
    with pytest.raises(OptionError, match=r"smooth must be between 0 and 1, got 1\.5"):
        compress(tiny, tmp_path / "out", calibration=text, smooth=1.5, **SMALL)
