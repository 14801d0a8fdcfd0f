"""Reading model directories that lie, and writing ones that are whole or not there at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.formats.checkpoints import write_checkpoint, write_raw, write_shards
from vllm_sparse.errors import FormatError, OutputError
from vllm_sparse.formats.checkpoint import INDEX, Checkpoint, CheckpointWriter

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(2, dtype=torch.bfloat16)}


def test_headers_are_read_and_data_on_demand(tmp_path):
    write_checkpoint(tmp_path, TENSORS)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config["dtype"] == "bfloat16"
        assert set(checkpoint.tensors) == set(TENSORS)
        info = checkpoint.tensors["a.weight"]
        assert (info.shape, info.dtype, info.file, info.nbytes) == ((3, 4), torch.float32, "model.safetensors", 48)
        assert torch.equal(checkpoint.load("a.weight"), TENSORS["a.weight"])
        assert [file.name for file in checkpoint.other_files()] == ["tokenizer.json"]
        with pytest.raises(FormatError, match=f"{tmp_path}: there is no tensor c.weight"):
            checkpoint.load("c.weight")


def test_shards_are_found_by_the_index(tmp_path):
    write_shards(tmp_path, {"x.safetensors": {"a": torch.ones(1)}, "y.safetensors": {"b": torch.zeros(2)}})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["b"].file == "y.safetensors"
        assert checkpoint.load("b").tolist() == [0, 0]


def refuse(path, message):
    with pytest.raises(FormatError, match=message):
        Checkpoint(path)


def test_what_is_no_model_directory_is_an_error(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere: no such model directory")
    refuse(tmp_path, "not a model directory, config.json is missing")
    (tmp_path / "config.json").write_text("{}")
    refuse(tmp_path, "no .safetensors file in the model directory")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "expected a JSON object"),
        (b"[" * 100000, "cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    ],
    ids=["cut", "no utf-8", "a list", "deep", "a long number"],
)
def test_a_config_that_is_no_json_object_is_an_error(tmp_path, text, message):
    write_checkpoint(tmp_path, TENSORS)
    (tmp_path / "config.json").write_bytes(text)
    refuse(tmp_path, f"config.json: {message}")


def test_a_giant_config_is_not_read(tmp_path):
    write_checkpoint(tmp_path, TENSORS)
    os.truncate(tmp_path / "config.json", 1 << 40)  # sparse: takes no disk
    refuse(tmp_path, "config.json: 1099511627776 bytes are too many")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_truncated_shard_is_an_error(tmp_path, keep):
    write_checkpoint(tmp_path, TENSORS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(tmp_path, "model.safetensors: truncated or not a safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"shape": [1], "data_offsets": [0, 4]}},
        b"{",
        b"[]",
        b"",
    ],
)
def test_a_header_that_lies_is_an_error(tmp_path, header):
    write_checkpoint(tmp_path, TENSORS)
    write_raw(tmp_path / "model.safetensors", header, b"\0" * 4)
    refuse(tmp_path, "model.safetensors: truncated or not a safetensors file")


def test_a_header_longer_than_the_file_takes_no_memory(tmp_path):
    write_checkpoint(tmp_path, TENSORS)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    refuse(tmp_path, "model.safetensors: truncated or not a safetensors file")


def test_a_dtype_that_nobody_uses_here_is_an_error(tmp_path):
    write_checkpoint(tmp_path, TENSORS)
    write_raw(tmp_path / "model.safetensors", {"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8)
    refuse(tmp_path, "model.safetensors: tensor 'a' has unsupported dtype C64")


def test_an_index_that_lies_is_an_error(tmp_path):
    shards = {"x.safetensors": {"a": torch.ones(1)}, "y.safetensors": {"b": torch.zeros(2)}}
    write_shards(tmp_path / "swapped", shards, {"a": "y.safetensors", "b": "x.safetensors"})
    refuse(tmp_path / "swapped", "tensor '[ab]' is in the index but not in the file")
    write_shards(tmp_path / "more", shards, {"a": "x.safetensors", "c": "y.safetensors"})
    refuse(tmp_path / "more", "y.safetensors: tensor 'c' is in the index but not in the file")
    write_shards(tmp_path / "gone", shards, {"a": "x.safetensors", "b": "z.safetensors"})
    refuse(tmp_path / "gone", "z.safetensors: the shard is missing")
    write_shards(tmp_path / "empty", shards, {})
    refuse(tmp_path / "empty", f"{INDEX}: there is no weight_map")
    write_shards(tmp_path / "list", shards)
    (tmp_path / "list" / INDEX).write_text('{"weight_map": ["a"]}')
    refuse(tmp_path / "list", f"{INDEX}: there is no weight_map")


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    write_shards(
        tmp_path,
        {
            "x.safetensors": {"a": torch.ones(1), "c": torch.ones(1)},
            "y.safetensors": {"a": torch.zeros(1), "b": torch.ones(1)},
        },
    )
    refuse(tmp_path, "tensor 'a' is in .* as well")


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None, "x\0y"])
def test_names_do_not_leave_the_directory(tmp_path, file):
    write_checkpoint(tmp_path / "model", {"a": torch.ones(1)})
    write_checkpoint(tmp_path, {"a": torch.ones(1)})
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    refuse(tmp_path / "model", "which is no file name|the shard is missing")


def contents(path):
    return sorted(file.name for file in path.iterdir())


def test_what_is_written_can_be_read(tmp_path):
    (tmp_path / "tokenizer.json").write_text("words")
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.write_json("config.json", {"a": 1})
        writer.copy(tmp_path / "tokenizer.json")
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    assert contents(tmp_path) == ["out", "tokenizer.json"]
    assert contents(tmp_path / "out") == ["config.json", "model.safetensors", "tokenizer.json"]
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in TENSORS.items())


def test_large_checkpoints_are_written_in_shards(tmp_path):
    with CheckpointWriter(tmp_path / "out", shard_bytes=100) as writer:
        writer.write_json("config.json", {})
        for number in range(5):
            writer.add(f"t{number}", torch.full((10,), float(number)))
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert contents(tmp_path / "out") == ["config.json", *files, INDEX]
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert [checkpoint.tensors[f"t{number}"].file for number in range(5)] == [files[i // 2] for i in range(5)]
        assert checkpoint.load("t4").tolist() == [4.0] * 10
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == 200


def test_tied_tensors_are_written_twice(tmp_path):
    tensor = torch.arange(8.0)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.write_json("config.json", {})
        writer.add("a", tensor)
        writer.add("b", tensor)
        writer.add("c", tensor[2:4])
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert torch.equal(checkpoint.load("b"), tensor)
        assert checkpoint.load("c").tolist() == [2.0, 3.0]


def test_an_output_that_is_not_empty_is_kept_unless_forced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with CheckpointWriter(out) as writer:  # an empty one is fine
        writer.write_text("first", "")
    with pytest.raises(OutputError, match="out: the output directory is not empty; use --force to replace it"):
        CheckpointWriter(out)
    with CheckpointWriter(out, force=True) as writer:
        writer.write_text("second", "")
    assert contents(out) == ["model.safetensors", "second"]
    assert contents(tmp_path) == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: exists and is not a directory"):
        CheckpointWriter(tmp_path / "file")
    with pytest.raises(OutputError, match="is not a directory that can be replaced"):
        CheckpointWriter("/", force=True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(error), CheckpointWriter(tmp_path / "out") as writer:
        writer.write_json("config.json", {})
        writer.add("a", torch.ones(1))
        raise error
    assert contents(tmp_path) == []


def test_an_interruption_keeps_what_was_to_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "out", force=True) as writer:
        writer.add("a", torch.ones(1))
        raise RuntimeError
    assert contents(tmp_path / "out") == ["old"]
    assert contents(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_old_output_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    rename = Path.rename

    def fail(self, target):
        if ".partial-" in self.name:
            raise OSError("no rename today")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="no rename today"), CheckpointWriter(tmp_path / "out", force=True):
        pass
    assert contents(tmp_path / "out") == ["old"]
    assert contents(tmp_path) == ["out"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_sparse.formats.checkpoint.save_file", full)
    message = "safetensors: cannot be written .*No space left on device.*; nothing was left behind"
    with pytest.raises(OutputError, match=message), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(1))
    assert contents(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_real_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(OutputError, match="No space left on device"), CheckpointWriter(tmp_path / "out") as writer:
        (writer.directory / "config.json").symlink_to("/dev/full")
        writer.write_json("config.json", {})
    assert contents(tmp_path) == []


def test_an_output_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), CheckpointWriter(tmp_path / "file" / "out"):
        pass


def test_sigterm_leaves_nothing(tmp_path):
    script = (
        "import sys, time\n"
        "from vllm_sparse.formats.checkpoint import CheckpointWriter\n"
        "with CheckpointWriter(sys.argv[1]) as writer:\n"
        "    writer.write_text('config.json', '{}')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    assert len(contents(tmp_path)) == 1
    child.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert child.wait(timeout=30) != 0
    assert time.monotonic() - start < 30
    assert contents(tmp_path) == []
