"""Tables are made from results files, whoever wrote them."""

import json

import pytest

from benchmarks import plot_compress, tables

VERSIONS = {"torch": "2.11.0", "vllm": "0.26.0"}


def write(folder, name, data):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"machine": "m", "date": "2026-01-02", "versions": VERSIONS} | data))


def linear_rows(kernel, us, layers=tables.LAYERS):
    shape = {"scheme": "fp8", "model": "Llama", "n": 1, "k": 1}
    return [shape | {"kernel": kernel, "layer": layer, "m": m, "us": us} for layer in layers for m in (1, 16)]


def test_linear_results_become_sums_and_a_ratio_to_the_best_dense(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    rows = linear_rows("vllm-sparse", 10.0) + linear_rows("vllm-fp8", 17.5) + linear_rows("cusparselt", 2.0)
    rows += linear_rows("torch-fp8", 1.0, ("qkv",))
    write(tmp_path / "h200", "linear-fp8.json", {"read_tbps": 4.4, "rows": rows})
    text = tables.section(tmp_path)
    assert (
        "### h200" in text and "2026-01-02, torch 2.11.0, vllm 0.26.0 ([linear-fp8.json](h200/linear-fp8.json))" in text
    )
    assert "| vllm-sparse fp8 | 40.0 | 40.0 |" in text and "| fp8: best dense / ours | 1.75x | 1.75x |" in text
    assert "torch-fp8" not in text


def test_many_numbers_of_tokens_become_the_least_gain_of_each_range(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    row = {"scheme": "fp8", "model": "Llama", "n": 1, "k": 1, "layer": "o"}
    rows = [row | {"kernel": "vllm-sparse", "m": m, "us": 10.0} for m in range(1, 20)]
    rows += [row | {"kernel": "vllm-fp8", "m": m, "us": 15.0 + m % 7} for m in range(1, 20)]
    rows += [row | {"kernel": "cusparselt", "m": m, "us": 1.0} for m in range(1, 20)]
    write(tmp_path / "h200", "linear-sweep.json", {"rows": rows})
    text = tables.section(tmp_path)
    assert "**Llama**, 19 numbers of tokens" in text
    assert "| fp8 | 1.50x (o, 14) | 1.80x (o, 17) | – |" in text


def test_accuracy_results_become_means_over_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    rows = [{"method": "ours-w4a16", "draw": i, "nll": 2 + i, "valid_24": True, "seconds": 60} for i in range(3)]
    write(tmp_path / "cpu", "accuracy-pyllama.json", {"model": "/models/pyllama", "rows": rows})
    text = tables.section(tmp_path)
    assert "**pyllama**" in text and "| ours-w4a16 | 3.0000 | 2.0000 … 4.0000 | 3 | yes | 60 |" in text


def test_compress_results_become_seconds_and_ratios(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    rows = [{"tool": "ours", "recipe": "sparsegpt", "threads": 2, "call_wall": seconds} for seconds in (9, 10, 30)]
    ratios = [{"recipe": "sparsegpt", "against": "sparsegpt", "threads": 2, "call_wall": 5.0, "call_cpu": 4.5}]
    versions = {"ours": {"torch": "1"}, "rival": {"llmcompressor": "2"}}
    told = {"model": "p", "calibration": {"sequences": 8, "length": 4}, "rival": "l==2", "rows": rows, "ratios": ratios}
    write(tmp_path / "cpu", "compress-speed-p.json", told | {"versions": versions})
    row = {"shapes": "tiny", "blocks": 2, "sequences": 8, "length": 4, "seconds": 3.0}
    phases = {"calibrate": 0.25, "propagate": 0.5, "prune": 1.0, "quantize": 1.0, "write": 0.25}
    write(tmp_path / "cpu", "compress-shapes.json", {"model": "random", "rows": [row | {"phases": phases}]})
    text = tables.section(tmp_path)
    assert "| sparsegpt / sparsegpt | 2 | 10.0 | 5.0x | – | 4.5x | – |" in text
    assert "with 8 x 4 tokens" in text and "2026-01-02, ours, torch 1, rival, llmcompressor 2" in text
    assert "| tiny | 2 | 8 x 4 | 3.00 | 0.75 | 2.00 |" in text


def test_the_curves_of_compressing_are_of_what_varies():
    def row(blocks, sequences):
        phases = {"calibrate": blocks * sequences, "prune": 10 * blocks}
        seconds = 1 + sum(phases.values())
        return {"shapes": "s", "blocks": blocks, "sequences": sequences, "length": 1000, "phases": phases} | {
            "seconds": seconds
        }

    rows = [row(1, 8), row(2, 8), row(4, 8), row(2, 16), row(2, 32), row(1, 64) | {"shapes": "other"}]
    found = plot_compress.curves(rows)
    assert [x for x, _ in found["blocks"][1]] == [1, 2, 4]
    assert [x for x, _ in found["million calibration tokens"][1]] == pytest.approx([0.008, 0.016, 0.032])
    assert plot_compress.line(found["blocks"][1], "all") == pytest.approx((18, 1, 0))
    assert plot_compress.line(found["million calibration tokens"][1], "tokens") == pytest.approx((2000, 0, 0))
