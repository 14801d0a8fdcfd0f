"""Sequences of different length: nothing enters H but their tokens, however they are batched."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.compress.conftest import make_model
from vllm_sparse.compress import Recipe, compress, job
from vllm_sparse.compress.activations import Activations
from vllm_sparse.compress.block import BlockRun
from vllm_sparse.compress.progress import Progress
from vllm_sparse.compress.sequences import Sequences
from vllm_sparse.errors import OptionError
from vllm_sparse.formats.checkpoint import Checkpoint

LENGTHS = (40, 3, 17, 40, 1, 25)


@pytest.fixture
def sequences():
    dice = torch.Generator().manual_seed(0)
    return Sequences.of([torch.randint(256, (length,), generator=dice) for length in LENGTHS])


def hessians(model, sequences):
    """Return H times tokens of every input of the first block, by the name of its first layer."""
    own = job.Job(Checkpoint(model), Recipe(group_size=32), torch.device("cpu"))
    state = Activations(own.model, sequences, own.batch_tokens, targeted=False)
    with torch.no_grad():
        run = BlockRun(own, 0, lambda name, tensor: None, state, Progress(1, quiet=True))
        return {group.names[0]: group.h * group.tokens for group in run._groups()}


def test_h_is_that_of_each_sequence_alone_and_of_a_padded_batch_without_its_padding(tiny, sequences, monkeypatch):
    monkeypatch.setattr(job, "_compute_dtype", lambda device, source: torch.float32)
    together = hessians(tiny, sequences)
    assert len(together) == 4
    alone = [hessians(tiny, Sequences((row,))) for row in sequences]

    padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=256)
    real = torch.arange(padded.shape[1]) < torch.tensor(LENGTHS)[:, None]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    seen = {}
    for name in together:
        hook = lambda module, args, name=name: seen.__setitem__(name, args[0][real])  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=padded, attention_mask=real.long())
    for name, h in together.items():
        torch.testing.assert_close(h, sum(one[name] for one in alone), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(h, seen[name].T @ seen[name], rtol=1e-5, atol=1e-4)


def test_each_sequence_is_in_one_batch_of_its_length(sequences):
    batches = sequences.batches(60)
    assert [tuple(batch.shape) for batch in batches] == [(1, 40), (1, 40), (1, 25), (1, 17), (1, 3), (1, 1)]
    assert sequences.batches(80)[0].shape == (2, 40)
    assert sequences.tokens == sum(LENGTHS) and (sequences.shortest, sequences.longest) == (1, 40)
    found = {tuple(row.tolist()) for batch in batches for row in batch}
    assert found == {tuple(row.tolist()) for row in sequences}


def test_the_fingerprint_knows_where_a_sequence_ends():
    one, other = (Sequences.of(torch.arange(12).split(sizes)) for sizes in ([4, 8], [8, 4]))
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    "options",
    [{}, {"refine": 3, "generate": 2}, {"scheme": "int8", "group_size": -1, "smooth": 0.5, "keep_dense": "owl:1"}],
)
def test_conversations_compress_a_model(text, tmp_path, options):
    model = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    words, lengths = text.read_text(), (90, 31, 7, 60, 60, 300)
    rows = [{"messages": [{"role": "user", "content": words[:length]}]} for length in lengths]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    small = {"num_samples": 9, "seq_len": 64, "group_size": 32, "quiet": True, "device": "cpu"}
    report = compress(model, tmp_path / "out", calibration=file, **(small | options))
    generated = options.get("generate", 0)
    tokens = 64 + 31 + 7 + 60 + 60 + 64 + 64 * generated
    assert report.calibration["sequences"] == 6 + generated and report.calibration["tokens"] == tokens
    assert {layer.tokens for layer in report.layers} == {tokens} and report.verification.violations == 0


def test_a_sequence_of_no_tokens_is_refused(tiny, tmp_path):
    rows = [torch.arange(4), torch.arange(0)]
    with pytest.raises(OptionError, match=r"or a list of \[length\], and not empty, got \[\[4\], \[0\]\]"):
        compress(tiny, tmp_path / "out", calibration=rows, group_size=32, device="cpu")
