"""Write docs/performance.md and the README's digest of it from ``benchmarks/results``; no number is typed by hand.

python -m benchmarks.report          # also: make report
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.tables import described
from vllm_sparse.bench.report import table
from vllm_sparse.bench.summary import Summary

README = tables.ROOT / "README.md"
PAGE = tables.ROOT / "docs" / "performance.md"
BEGIN = "<!-- performance: written by `make report` from benchmarks/results -->"
END = "<!-- end of performance -->"
TOKENS = (1, 16, 64, 256, 1024, 4096)
MODEL = "Llama-3.1-8B"


def linear(data: dict[str, Any], file: Path) -> list[str]:
    """Return a table of how many times as fast the sum of a block's linear layers is, per scheme and tokens."""
    sums = tables.sums_of(tables.layer_times(data)[MODEL])
    schemes = sorted({scheme for kernel, scheme, _ in sums if kernel == tables.OURS})
    tokens = [m for m in TOKENS if any(key[0] == tables.OURS and key[2] == m for key in sums)]
    rows = []
    for scheme in schemes:
        dense = tables.dense_of(sums, scheme)
        same = any(of == scheme for _, of in dense)
        peers = " or ".join(kernel for kernel, _ in dense) if same else "any dense kernel"
        rows.append([scheme, peers, *tables.ratios(sums, dense, scheme, tokens)])
        if scheme != "bf16":
            rows.append([scheme, "bf16", *tables.ratios(sums, tables.bf16_of(sums), scheme, tokens)])
    head = f"**Linear layers of {MODEL} on {file.parent.name}**, times as fast, by tokens; {described(data, file)}"
    return [head, "", table(["2:4", "than dense", *map(str, tokens)], rows), ""]


def serving(data: dict[str, Any], file: Path) -> list[str]:
    """Return a table of what each model gains over the first, as means over use cases, and the size of its weights."""
    summary = Summary(data)
    rows = []
    for model in summary.models:
        latency = summary.mean_ratio("latency", model, summary.latency, lower_is_better=True)
        throughput = summary.mean_ratio("throughput", model, summary.throughput)
        cells = ["–" if gain is None else f"{gain:.2f}x" for gain in (latency, throughput)]
        sizes = [row["weight_bytes"] for row in summary.rows("memory", model=model) if row.get("weight_bytes")]
        rows.append([model, *cells, f"{sizes[0] / 1e9:.2f} GB" if sizes else "–"])
    cases = len(summary.cases("latency"))
    over = f"means over {cases} use cases" if cases > 1 else "one use case"
    name = file.stem.removeprefix("serving-").removesuffix("-landed")
    head = f"**vLLM on {file.parent.name}**, {name}, {over}; {described(data, file)}"
    return [head, "", table(["model", "one request at a time", "requests per second", "weights"], rows), ""]


# What the README shows of the results, in this order.
DIGEST = {
    "h200/linear-llama-3.1-8b.json": linear,
    "h200/serving-llama-3.1-8b-landed.json": serving,
    "epyc-zen4-2cpu/linear-cpu.json": linear,
    "epyc-zen3-2cpu/linear-cpu.json": linear,
    "epyc-zen4-2cpu/serving-llama-3.2-1b.json": serving,
    "epyc-zen4-2cpu/accuracy-pyllama-27m.json": tables.accuracy,
    "epyc-zen4-2cpu/compress-speed-landed-pyllama-27m.json": tables.compress_speed,
}


def digest(results: Path) -> str:
    """Return the README's tables: those of ``DIGEST`` that there are."""
    parts = []
    for name, make in DIGEST.items():
        file = results / name
        if file.exists():
            parts += make(json.loads(file.read_text(encoding="utf-8")), file)
    return "\n".join(parts).strip()


def page(results: Path) -> str:
    """Return docs/performance.md."""
    body = tables.section(results).replace("](benchmarks/", "](../benchmarks/")
    return f"# Performance\n\nWritten by `make report` from [benchmarks/results](../benchmarks/results).\n\n{body}\n"


def replaced(text: str, body: str) -> str:
    """Return ``text`` with ``body`` between the two markers, which are appended where there are none."""
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n## Performance\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{body}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    """Rewrite both; return the exit status."""
    body = digest(tables.RESULTS)
    if not body:
        print(f"no results in {tables.RESULTS}", file=sys.stderr)
        return 1
    PAGE.write_text(page(tables.RESULTS), encoding="utf-8")
    README.write_text(replaced(README.read_text(encoding="utf-8"), body), encoding="utf-8")
    print(f"{PAGE} and {README} are up to date with {tables.RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
