"""Calibration text from files, directories, JSON lines and datasets becomes sequences, conversations one each."""

import json
import sys
import types

import pytest
import torch
from transformers import AutoTokenizer

from vllm_sparse.compress.calibration import load_calibration
from vllm_sparse.errors import OptionError


@pytest.fixture(scope="module")
def tokenizer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


def text_of(tokenizer, ids):
    return "".join(tokenizer.decode(row) for row in ids).replace("<eos>", "|")


def shapes(sequences):
    return [tuple(row.shape) for row in sequences]


def test_a_directory_gives_all_its_text_files_and_skips_others(tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("aaaa")
    (tmp_path / "sub" / "b.md").write_text("bbbb")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00cccc")
    ids = load_calibration(tmp_path, tokenizer, 10, 5, seed=0)
    assert sorted(text_of(tokenizer, ids).strip("|").split("|")) == ["aaaa", "bbbb"]


def write_lines(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return file


def chat(*contents):
    return {"messages": [{"role": "user", "content": content} for content in contents]}


def test_lines_of_json_hold_text_content_or_messages(tokenizer, tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [{"text": "one"}, {"content": "two"}, chat("three")])
    ids = load_calibration(file, tokenizer, 100, 1, seed=0)
    assert sorted(text_of(tokenizer, ids).strip("|").split("|")) == ["one", "two", "u"]


def test_a_conversation_is_a_sequence_of_its_own_length(tokenizer, tmp_path):
    rows = [chat("a"), chat("b", "c" * 30), chat("d" * 70_000), chat("e")]
    ids = load_calibration(write_lines(tmp_path / "rows.jsonl", rows), tokenizer, 100, 50, seed=0)
    texts = [tokenizer.decode(row) for row in ids]
    whole = ["user: a\n", "user: b\nuser: " + "c" * 30 + "\n", "user: " + "d" * 44, "user: e\n"]
    assert sorted(texts) == sorted(whole)  # the third one is cut once, not into parts
    assert len(load_calibration(tmp_path / "rows.jsonl", tokenizer, 2, 50, seed=0)) == 2


def test_messages_that_the_template_does_not_take_are_named(tokenizer, tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [chat("one"), {"messages": []}])
    with pytest.raises(OptionError, match=r"rows.jsonl, line 2: the chat template does not take its messages \(.+\)"):
        load_calibration(file, tokenizer, 2, 9, seed=0)


def test_conversations_need_a_chat_template(tiny, tmp_path):
    plain = AutoTokenizer.from_pretrained(tiny)
    file = write_lines(tmp_path / "rows.jsonl", [{"text": "one"}, chat("two")])
    with pytest.raises(OptionError, match=r"rows.jsonl, line 2: has messages, but the model's tokenizer has no "):
        load_calibration(file, plain, 2, 9, seed=0)


def test_the_seed_decides_the_sequences(tokenizer, text):
    first = load_calibration(text, tokenizer, 8, 32, seed=0)
    assert shapes(first) == [(32,)] * 8 and first.rows[0].dtype == torch.int64
    assert first.fingerprint() == load_calibration(text, tokenizer, 8, 32, seed=0).fingerprint()
    assert first.fingerprint() != load_calibration(text, tokenizer, 8, 32, seed=1).fingerprint()


def test_short_text_gives_fewer_sequences(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 70)
    assert shapes(load_calibration(tmp_path / "short.txt", tokenizer, 8, 32, seed=0)) == [(32,)] * 2


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
    assert shapes(ids) == [(9,)] * 2
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
