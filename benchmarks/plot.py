"""Draw the speed-up over dense kernels against tokens, from a file of ``benchmarks.linear``.

python -m benchmarks.plot benchmarks/results/h200/linear-llama-3.1-8b.json [--scheme fp8]

One line per scheme of ours for the sum of the layers, against dense bf16, beside the file; with ``--scheme`` one line
per layer, against the fastest dense kernel of that scheme or of bf16, as ``<file>-<scheme>.svg``.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = "vllm-sparse"
SPARSE = (OURS, "vllm-sparse-mma", "cusparselt")
BF16 = ("vllm-cpu-bf16", "torch-bf16")  # the first that was measured
LAYERS = ("qkv", "o", "gate_up", "down")
Lines = dict[str, list[tuple[int, float]]]


def by_layer(rows: list[dict[str, Any]], scheme: str) -> Lines:
    """Return per layer (m, fastest dense kernel / ours) for every m that has both."""
    times: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["scheme"] != scheme and (row["kernel"] == OURS or row["scheme"] != "bf16"):
            continue
        times[row["layer"], row["m"]][row["kernel"]] = row["us"]
    lines: Lines = defaultdict(list)
    for (layer, m), us in sorted(times.items()):
        dense = [time for kernel, time in us.items() if kernel not in SPARSE]
        if dense and OURS in us:
            lines[layer].append((m, min(dense) / us[OURS]))
    return dict(lines)


def by_scheme(rows: list[dict[str, Any]]) -> Lines:
    """Return per scheme of ours (m, dense bf16 / ours), times summed over the layers."""
    sums: dict[tuple[str, str, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        sums[row["kernel"], row["scheme"], row["m"]][row["layer"]] = row["us"]
    whole = {key: sum(layers.values()) for key, layers in sums.items() if set(layers) >= set(LAYERS)}
    peer = next(kernel for kernel in BF16 if any(key[0] == kernel for key in whole))
    lines: Lines = defaultdict(list)
    for (kernel, scheme, m), us in sorted(whole.items()):
        if kernel == OURS and (peer, "bf16", m) in whole:
            lines[scheme].append((m, whole[peer, "bf16", m] / us))
    return dict(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--scheme")
    arguments = parser.parse_args()
    import matplotlib.pyplot as plt

    report = json.loads(arguments.report.read_text())
    rows = [row for row in report["rows"] if row["model"] == arguments.model]
    scheme, file = arguments.scheme, arguments.report
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in (by_layer(rows, scheme) if scheme else by_scheme(rows)).items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    peer, title = ("the fastest dense kernel", f"{arguments.model}, {scheme}") if scheme else ("bf16", arguments.model)
    axes.set(xscale="log", xlabel="tokens", ylabel=f"times {peer}", ylim=(0, None), title=title)
    axes.legend()
    figure.savefig(file.with_name(f"{file.stem}-{scheme}.svg" if scheme else f"{file.stem}.svg"), bbox_inches="tight")


if __name__ == "__main__":
    main()
