"""One short run on vLLM itself: engine, server and vLLM's own client, on a model without weights."""

import json

import pytest

from vllm_sparse.cli import main

pytest.importorskip("vllm")
pytestmark = pytest.mark.serve
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def test_engine_server_and_client(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    out = tmp_path / "out"
    what = ["--dummy", str(config), "--variants", "sparse24-w4a16", "--suite", "latency", "throughput", "serve"]
    how = ["--scale", "0.1", "--use-case", "instruction", "--repeats", "1", "--rounds", "1", "--requests", "2"]
    load = ["--rates", "20", "--arrivals", "poisson", "--seconds", "0.1", "--engine-args", "--enforce-eager "]
    assert main(["bench", *what, *how, *load, "-o", str(out)]) == 0
    data = json.loads((out / "bench.json").read_text())
    rows = {(row["suite"], row.get("arrival")): row for row in data["rows"]}
    assert set(rows) == {("memory", None), ("latency", None), ("throughput", None)} | {
        ("serve", arrival) for arrival in ("single", "at-once", "poisson")
    }
    assert rows["memory", None]["plugin"][0].startswith("4 of 4 linear layers run 2:4, scheme w4a16")
    assert rows["memory", None]["weight_bytes"] < 300_000
    poisson = rows["serve", "poisson"]
    assert (poisson["completed"], poisson["failed"], len(poisson["samples"]["ttft_ms"])) == (8, 0, 8)
    assert "ITL ≤ 50 ms, poisson" in (out / "report.md").read_text()
