"""Two processes on the CPU write what one writes, but for the order of sums, and resume what they began."""

import json
import os
import re
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
from vllm_sparse.errors import OptionError, OutputError
from vllm_sparse.formats.checkpoint import Checkpoint

OPTIONS = {"num_samples": 9, "seq_len": 64, "quiet": True, "device": "cpu"}


def start_two(model, text, out, batch_tokens=2048, **options):
    """Start compressing in two processes."""
    code = (
        "import torch; from vllm_sparse.compress import compress, job\n"
        "job._compute_dtype = lambda device, source: torch.float32\n"
        f"job._BATCH_TOKENS['cpu'] = {batch_tokens}\n"
        f"report = compress({str(model)!r}, {str(out)!r}, calibration={str(text)!r}, **{OPTIONS | options!r})\n"
        "print(report.to_json())"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def run_two(model, text, out, **options):
    """Compress in two processes; return what each of them reports."""
    processes = start_two(model, text, out, **options)
    results = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), results[0][1][-2000:] + results[1][1][-2000:]
    return [json.loads(printed[printed.index("{\n") :]) for printed, _ in results]


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
        # What turned over in the first block changes all the second one's inputs a little.
        assert layer["error"] == pytest.approx(own.error, rel=1e-2 if ".layers.0." in layer["name"] else 3e-2)
    one, two = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "two")
    assert set(one.tensors) == set(two.tensors)
    packed = [name for name in one.tensors if name.endswith("weight_packed")]
    same = {name: float((one.load(name) == two.load(name)).double().mean()) for name in packed}
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


def test_two_processes_refine_as_one_does(text, tmp_path, monkeypatch):
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    monkeypatch.setattr(job, "_compute_dtype", lambda device, source: torch.float32)
    monkeypatch.setattr(job, "_STAGED_BYTES", -1)
    # Nine sequences in batches of two: the last step of a round has a batch in one of the processes only.
    monkeypatch.setitem(job._BATCH_TOKENS, "cpu", 128)
    options = {"scheme": "bf16", "refine": 20, "pruner": "magnitude"}  # the same masks in both
    first, second = run_two(model, text, tmp_path / "two", batch_tokens=128, **options)
    assert first == second
    alone = compress(model, tmp_path / "one", calibration=text, **OPTIONS, **options)
    assert [layer["tokens"] for layer in first["layers"]] == [layer.tokens for layer in alone.layers]
    compress(model, tmp_path / "not", calibration=text, **OPTIONS, **(options | {"refine": 0}))
    one, two, untrained = (load_dense(tmp_path / name).state_dict() for name in ("one", "two", "not"))
    names = [name for name in one if name.endswith("proj.weight")]
    moved, apart = (sum((one[n] - other[n]).square().sum() for n in names).sqrt() for other in (untrained, two))
    assert apart < 0.01 * moved and moved > 0


def test_two_processes_resume_to_the_same_bytes(text, tmp_path):
    model = make_model(tmp_path / "model", num_hidden_layers=3)
    options = {"group_size": 32, "resume": True, "refine": 2, "curvature": 4, "residual": 0.5, "quiet": False}
    run_two(model, text, tmp_path / "whole", **options)
    processes = start_two(model, text, tmp_path / "out", **options)
    lines = (line for line in processes[0].stderr if re.match(r"\[ *\d+/21\]", line))
    for _ in range(10):  # into the second block
        next(lines)
    for process in processes:
        process.kill()
        process.communicate(timeout=60)
    assert len(json.loads((tmp_path / ".out.partial/manifest.json").read_text())["blocks"]) == 1
    with pytest.raises(OutputError, match=r"was begun with processes 2 and cannot be resumed with 1; delete it"):
        compress(model, tmp_path / "out", calibration=text, **(options | OPTIONS))
    first, second = run_two(model, text, tmp_path / "out", **options)
    assert first == second and len(first["layers"]) == 21
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / d).glob("*.safetensors*")} for d in ("whole", "out"))
    assert whole == out and len(out) == 5  # a shard for each block, one for the rest, and the index
