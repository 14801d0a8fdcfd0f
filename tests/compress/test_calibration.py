"""Calibration text from files, directories, JSON lines and datasets becomes sequences of one length."""

import json
import sys
import types

import pytest
import torch
from transformers import AutoTokenizer

from vllm_sparse.compress.calibration import fingerprint, load_calibration
from vllm_sparse.errors import OptionError


@pytest.fixture(scope="module")
def tokenizer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


def text_of(tokenizer, ids):
    return "".join(tokenizer.decode(row) for row in ids).replace("<eos>", "|")


def test_a_directory_gives_all_its_text_files_and_skips_others(tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("aaaa")
    (tmp_path / "sub" / "b.md").write_text("bbbb")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00cccc")
    ids = load_calibration(tmp_path, tokenizer, 10, 5, seed=0)
    assert sorted(text_of(tokenizer, ids).strip("|").split("|")) == ["aaaa", "bbbb"]


def test_lines_of_json_hold_text_content_or_messages(tokenizer, tmp_path):
    rows = [{"text": "one"}, {"content": "two"}, {"messages": [{"role": "user", "content": "three"}]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    ids = load_calibration(file, tokenizer, 100, 1, seed=0)
    assert sorted(text_of(tokenizer, ids).strip("|").split("|")) == ["one", "two", "user: three\n"]


def test_the_seed_decides_the_sequences(tokenizer, text):
    first = load_calibration(text, tokenizer, 8, 32, seed=0)
    assert first.shape == (8, 32) and first.dtype == torch.int64
    assert fingerprint(first) == fingerprint(load_calibration(text, tokenizer, 8, 32, seed=0))
    assert fingerprint(first) != fingerprint(load_calibration(text, tokenizer, 8, 32, seed=1))


def test_short_text_gives_fewer_sequences(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 70)
    assert load_calibration(tmp_path / "short.txt", tokenizer, 8, 32, seed=0).shape == (2, 32)


class Rows(list):
    def shuffle(self, seed, buffer_size):
        return self


def test_a_dataset_is_streamed_by_id_and_configuration(tokenizer, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Rows([{"text": "abcdefgh"}] * 3)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    ids = load_calibration("team/words:en", tokenizer, 2, 9, seed=0)
    assert ids.shape == (2, 9)
    assert asked == [(("team/words", "en"), {"split": "train", "streaming": True})]


def test_a_dataset_without_text_is_named(tokenizer, monkeypatch):
    rows = types.SimpleNamespace(load_dataset=lambda *_, **__: Rows([{"label": 1}]))
    monkeypatch.setitem(sys.modules, "datasets", rows)
    with pytest.raises(OptionError, match="calibration team/labels: its rows have no text, content or messages"):
        load_calibration("team/labels", tokenizer, 2, 9, seed=0)


def test_a_dataset_that_cannot_be_loaded_is_named(tokenizer, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(OptionError, match=r"neither a file nor a dataset that can be loaded \(offline\)"):
        load_calibration("team/none", tokenizer, 2, 9, seed=0)
