"""What any OpenAI client sees of a 2:4 model is what it sees of the dense model: streams, batches and refusals."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import BadRequestError, OpenAI
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_sparse.formats.checkpoint import Checkpoint, CheckpointWriter
from vllm_sparse.formats.sparse24 import Sparse24Format
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from server import ServerError, serve

pytestmark = pytest.mark.serve
PROMPTS = [[5, 9, 2, 7], [3], [11, 4], [8, 8, 8], [60, 1, 2], [40, 41], [7, 30, 2], [12]]


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory):
    """A random bf16 Llama whose linear weights are 2:4. Served in float32, so that no tie can flip a greedy token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            groups = torch.randn_like(module.weight).view(-1, 4) / 8
            groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0.0)
            module.weight.data = groups.view_as(module.weight)
    path = tmp_path_factory.mktemp("dense")
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sparse_model(dense_model, tmp_path_factory):
    """The same model in the native format."""
    out = tmp_path_factory.mktemp("sparse") / "model"
    form = Sparse24Format(SCHEMES["bf16"], ignore=("lm_head",))
    source = Checkpoint(dense_model)
    with CheckpointWriter(out) as writer:
        for name in source.tensors:
            tensor, module = source.load(name), name.removesuffix(".weight")
            if module.endswith("_proj"):
                weight = Sparse24Weight.from_dense(tensor, form.scheme, layer=module)
                for suffix, part in form.from_weight(weight).items():
                    writer.add(f"{module}.{suffix}", part)
            else:
                writer.add(name, tensor)
        writer.write_json("config.json", source.config | {"quantization_config": form.to_config()})
        for file in source.other_files():
            writer.copy(file)
    return out


def answers(model, log):
    """Return what a client gets for a stream, for eight requests at once, and for requests that are wrong."""
    options = ["--served-model-name", "m", "--max-model-len", "128", "--enforce-eager", "--dtype", "float32"]
    with serve(model, log, options) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)

        def complete(prompt, **more):
            return client.completions.create(model="m", prompt=prompt, max_tokens=16, temperature=0, **more)

        streamed = [chunk.choices[0].text for chunk in complete(PROMPTS[0], stream=True) if chunk.choices]
        assert len(streamed) > 1  # how many a server that is busy makes of sixteen tokens is its own affair
        with ThreadPoolExecutor(8) as pool:
            together = [answer.choices[0].text for answer in pool.map(complete, PROMPTS)]
        refusals = []
        for bad in ({"prompt": [1] * 500}, {"prompt": PROMPTS[0], "extra_body": {"temperature": -1}}):
            with pytest.raises(BadRequestError) as refused:
                client.completions.create(model="m", max_tokens=16, **bad)
            refusals.append((refused.value.status_code, json.dumps(refused.value.body, sort_keys=True)))
    return "".join(streamed), together, refusals


def test_a_client_cannot_tell_the_difference(dense_model, sparse_model, tmp_path):
    dense = answers(dense_model, tmp_path / "dense.log")
    sparse = answers(sparse_model, tmp_path / "sparse.log")
    assert sparse == dense
    assert sparse[1][0] == sparse[0]
    log = (tmp_path / "sparse.log").read_text()
    assert "sparse24: " in log


def test_a_model_that_does_not_load_says_why(sparse_model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in sparse_model.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(ServerError), serve(broken, tmp_path / "log", ["--enforce-eager"]):
        pass
