"""Two processes on the CPU write what one writes, but for the order of sums."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from tests.compress.conftest import make_model
from tests.compress.test_experts import CONFIGS
from vllm_sparse.compress import compress, job
from vllm_sparse.compress.evaluate import load_dense, negative_log_likelihood
from vllm_sparse.compress.sequences import Sequences
from vllm_sparse.compress.world import World, _joined
from vllm_sparse.errors import OptionError
from vllm_sparse.formats.checkpoint import Checkpoint

OPTIONS = {"num_samples": 9, "seq_len": 64, "quiet": True, "device": "cpu"}


def run_two(model, text, out, **options):
    """Compress in two processes; return what each of them reports."""
    code = (
        "import torch; from vllm_sparse.compress import compress, job\n"
        "job._compute_dtype = lambda device, source: torch.float32\n"
        f"report = compress({str(model)!r}, {str(out)!r}, calibration={str(text)!r}, **{OPTIONS | options!r})\n"
        "print(report.to_json())"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), results[0][1][-2000:] + results[1][1][-2000:]
    return [json.loads(printed[printed.index("{") :]) for printed, _ in results]


def test_two_processes_write_what_one_writes(text, tmp_path, monkeypatch):
    model = make_model(tmp_path / "model", config=CONFIGS["qwen3_moe"])
    monkeypatch.setattr(job, "_compute_dtype", lambda device, source: torch.float32)
    monkeypatch.setattr(job, "_STAGED_BYTES", -1)  # calibrate whole blocks at once, as several processes do
    options = {"scheme": "int8", "activation": "static", "smooth": 0.5, "keep_dense": "owl:1"}
    first, second = run_two(model, text, tmp_path / "two", **options)
    assert first == second  # each returns the report of the first
    alone = compress(model, tmp_path / "one", calibration=text, **OPTIONS, **options)
    assert [layer["name"] for layer in first["layers"]] == [layer.name for layer in alone.layers]
    assert [layer["tokens"] for layer in first["layers"]] == [layer.tokens for layer in alone.layers]
    assert first["verification"]["violations"] == 0 and first["dense"] == list(alone.dense)
    for layer, own in zip(first["layers"], alone.layers, strict=True):
        assert layer["error"] == pytest.approx(own.error, rel=1e-2)
    one, two = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "two")
    assert set(one.tensors) == set(two.tensors)
    packed = [name for name in one.tensors if name.endswith("weight_packed")]
    same = {name: float((one.load(name) == two.load(name)).double().mean()) for name in packed}
    # What turned over in the first block changes all the second one's inputs a little.
    assert min(same.values()) > 0.5
    assert min(share for name, share in same.items() if ".layers.0." in name) > 0.9
    ids = torch.randint(257, (4, 60), generator=torch.Generator().manual_seed(0))
    losses = [negative_log_likelihood(load_dense(tmp_path / name), ids).mean() for name in ("one", "two")]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=2e-3)


def test_groups_of_layers_are_joined_where_one_process_saw_less():
    order = ["q", "k", "gate", "up", "down"]
    seen = [[("q", "k"), ("gate",), ("up",), ("down",)], [("q", "k"), ("gate", "up"), ("down",)]]
    assert _joined(seen, order) == [("q", "k"), ("gate", "up"), ("down",)]


def test_each_process_takes_its_rows():
    sequences = Sequences.of([torch.arange(length) for length in range(1, 6)])
    shares = [World(rank, 2).share(sequences) for rank in range(2)]
    assert sorted(len(row) for share in shares for row in share) == [1, 2, 3, 4, 5]
    with pytest.raises(OptionError, match="5 calibration sequences are too few for 6 processes"):
        World(0, 6).share(sequences)


@pytest.mark.parametrize(("word", "value"), [("refine", 1), ("resume", True)])
def test_what_one_process_alone_can_do(word, value, text, tmp_path, monkeypatch):
    monkeypatch.setattr(World, "join", lambda: World(0, 2))
    with pytest.raises(OptionError, match=f"{word} works in one process, not in 2"):
        compress(tmp_path / "model", tmp_path / "out", calibration=text, **OPTIONS, **{word: value})
