"""The README shows a digest of the results, docs/performance.md all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, tables


def write(file: Path, data: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"date": "2026-01-02", "versions": {"torch": "2.11.0"}} | data))


def rows(kernel: str, scheme: str, us: float) -> list[dict[str, Any]]:
    row = {"kernel": kernel, "scheme": scheme, "model": report.MODEL, "us": us}
    return [row | {"layer": layer, "m": m} for layer in tables.LAYERS for m in (1, 8)]


def test_the_digest_has_each_schemes_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    linear = rows("vllm-sparse", "w4a16", 2.0) + rows("vllm-marlin", "w4a16", 5.0) + rows("vllm-machete", "w4a16", 4.5)
    linear += rows("torch-bf16", "bf16", 8.0) + rows("cusparselt", "bf16", 1.0) + rows("vllm-sparse", "fp8", 4.0)
    write(tmp_path / "h200" / "linear-llama-3.1-8b.json", {"rows": linear})
    text = report.digest(tmp_path)
    assert "([linear-llama-3.1-8b.json](h200/linear-llama-3.1-8b.json))" in text
    assert "| 2:4 | than dense | 1 |\n" in text  # 8 tokens are for the page
    assert "| w4a16 | vllm-machete or vllm-marlin | 2.25x |" in text and "| w4a16 | bf16 | 4.00x |" in text
    assert "| fp8 | any dense kernel | 1.12x |" in text


def test_without_a_bf16_kernel_there_is_no_ratio_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    linear = rows("vllm-sparse", "fp8", 2.0) + rows("vllm-fp8", "fp8", 3.0)
    write(tmp_path / "h200" / "linear-llama-3.1-8b.json", {"rows": linear})
    assert "| fp8 | vllm-fp8 | 1.50x |" in report.digest(tmp_path) and "| fp8 | bf16 | – |" in report.digest(tmp_path)
    assert "| fp8: bf16 / ours | – | – |" in tables.section(tmp_path)


def test_the_page_compares_with_the_fastest_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    linear = rows("vllm-sparse", "fp8", 2.0) + rows("torch-bf16", "bf16", 9.0) + rows("vllm-cpu-bf16", "bf16", 4.0)
    write(tmp_path / "cpu" / "linear-cpu.json", {"rows": linear})
    assert "| fp8: bf16 / ours | 2.00x | 2.00x |" in tables.section(tmp_path)


def test_the_digest_has_each_models_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    data: dict[str, Any] = {"targets": [{"label": "bf16"}, {"label": "sparse"}], "rows": []}
    data["arguments"] = {"latency_cases": [("a", 8, 8), ("b", 8, 8)], "batch_cases": []}
    for case, dense, sparse in (("a", 2.0, 1.0), ("b", 4.0, 1.0)):
        for model, seconds in (("bf16", dense), ("sparse", sparse)):
            data["rows"].append({"suite": "latency", "model": model, "use_case": case, "seconds": [seconds]})
    data["rows"].append({"suite": "memory", "model": "sparse", "weight_bytes": 5 * 10**9})
    write(tmp_path / "h200" / "serving-llama-3.1-8b-landed.json", data)
    text = report.digest(tmp_path)
    assert "**vLLM on h200**, llama-3.1-8b, means over 2 use cases; 2026-01-02" in text
    assert "| sparse | 3.00x | – | 5.00 GB |" in text and "| bf16 | 1.00x | – | – |" in text


def test_the_page_links_from_the_docs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    write(tmp_path / "benchmarks/results/h200/linear-a.json", {"rows": rows("vllm-sparse", "fp8", 2.0)})
    assert "([linear-a.json](../benchmarks/results/h200/linear-a.json))" in report.page(tmp_path / "benchmarks/results")


@pytest.mark.parametrize("name", report.DIGEST)
def test_every_file_of_the_digest_exists(name: str) -> None:
    assert (tables.RESULTS / name).exists()


def test_only_what_is_between_the_markers_changes():
    once = report.replaced("# Title\n\ntext\n", "numbers")
    assert once == f"# Title\n\ntext\n\n## Performance\n\n{report.BEGIN}\nnumbers\n{report.END}\n"
    later = once.replace("text", "other text") + "\n## Licence\n"
    assert report.replaced(later, "more") == later.replace("numbers", "more")
