"""The README's performance section is made from results files, whoever wrote them."""

import json

from benchmarks import report

VERSIONS = {"torch": "2.11.0", "vllm": "0.26.0"}


def write(folder, name, data):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"machine": "m", "date": "2026-01-02", "versions": VERSIONS} | data))


def linear_rows(kernel, us, layers=report.LAYERS):
    shape = {"scheme": "fp8", "model": "Llama", "n": 1, "k": 1}
    return [shape | {"kernel": kernel, "layer": layer, "m": m, "us": us} for layer in layers for m in (1, 16)]


def test_linear_results_become_sums_and_a_ratio_to_the_best_dense(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    rows = linear_rows("vllm-sparse", 10.0) + linear_rows("vllm-fp8", 17.5) + linear_rows("cusparselt", 2.0)
    rows += linear_rows("torch-fp8", 1.0, ("qkv",))
    write(tmp_path / "h200", "linear-fp8.json", {"read_tbps": 4.4, "rows": rows})
    text = report.section(tmp_path)
    assert (
        "### h200" in text and "2026-01-02, torch 2.11.0, vllm 0.26.0 ([linear-fp8.json](h200/linear-fp8.json))" in text
    )
    assert "| vllm-sparse fp8 | 40.0 | 40.0 |" in text and "| fp8: best dense / ours | 1.75x | 1.75x |" in text
    assert "torch-fp8" not in text


def test_many_numbers_of_tokens_become_the_least_gain_of_each_range(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    row = {"scheme": "fp8", "model": "Llama", "n": 1, "k": 1, "layer": "o"}
    rows = [row | {"kernel": "vllm-sparse", "m": m, "us": 10.0} for m in range(1, 20)]
    rows += [row | {"kernel": "vllm-fp8", "m": m, "us": 15.0 + m % 7} for m in range(1, 20)]
    rows += [row | {"kernel": "cusparselt", "m": m, "us": 1.0} for m in range(1, 20)]
    write(tmp_path / "h200", "linear-sweep.json", {"rows": rows})
    text = report.section(tmp_path)
    assert "**Llama**, 19 numbers of tokens" in text
    assert "| fp8 | 1.50x (o, 14) | 1.80x (o, 17) | – |" in text


def test_accuracy_results_become_means_over_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    rows = [{"method": "ours-w4a16", "draw": i, "nll": 2 + i, "valid_24": True, "seconds": 60} for i in range(3)]
    write(tmp_path / "cpu", "accuracy-pyllama.json", {"model": "/models/pyllama", "rows": rows})
    text = report.section(tmp_path)
    assert "**pyllama**" in text and "| ours-w4a16 | 3.0000 | 2.0000 … 4.0000 | 3 | yes | 60 |" in text


def test_only_what_is_between_the_markers_changes():
    once = report.replaced("# Title\n\ntext\n", "numbers")
    assert once == f"# Title\n\ntext\n\n## Performance\n\n{report.BEGIN}\nnumbers\n{report.END}\n"
    later = once.replace("text", "other text") + "\n## Licence\n"
    assert report.replaced(later, "more") == later.replace("numbers", "more")
