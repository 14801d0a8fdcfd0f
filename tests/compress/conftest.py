"""A tiny causal LM with a byte tokenizer, made here, and calibration text for it."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

TEXT = "".join(f"def function_{i}(x):\n    return x * {i} + {i % 7}\n\n" for i in range(400))


def run_and_kill(model, out, text, number, after, options):
    """Start a run in a process of its own, which ends itself at layer ``after``: from here, a signal would be late."""
    code = (
        "import os, signal, torch; torch.set_num_threads(1); from vllm_sparse.compress import compress, block\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "line, solved = block.line, []\n"
        "def line_or_end(report):\n"
        "    solved.append(report)\n"
        f"    if len(solved) == {after}: os.kill(os.getpid(), {int(number)})\n"
        "    return line(report)\n"
        "block.line = line_or_end\n"
        f"compress({str(model)!r}, {str(out)!r}, calibration={str(text)!r}, num_samples=8, seq_len=64, device='cpu',"
        f" group_size=32, {options})"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode != 0 and not out.exists(), process.stderr
    assert int(number) == -process.returncode or "KeyboardInterrupt" in process.stderr


def save_tokenizer(path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)


def make_model(path, config=None, dtype=torch.bfloat16, seed=0, edit=None, **changes):
    """Save a random model and its tokenizer in ``path`` and return ``path``."""
    sizes = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**(sizes | changes))).to(dtype)
    if edit is not None:
        edit(model)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(TEXT)
    return file


def config_of(path):
    return json.loads((path / "config.json").read_text())
