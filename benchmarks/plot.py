"""Draw speed-up over dense against m, one line per shape, from a file of ``benchmarks.linear``.

python -m benchmarks.plot benchmarks/results/h200/linear-fp8.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PEERS = ("torch-bf16", "torch-fp8", "vllm-fp8", "vllm-int8", "vllm-marlin", "vllm-machete")


def speedups(report: dict, model: str, scheme: str | None = None) -> dict[str, list[tuple[int, float]]]:
    """Return per layer (m, fastest peer / vllm-sparse of ``scheme``) for every m that has both."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in report["rows"]:
        if row["model"] == model and (row["kernel"] != "vllm-sparse" or scheme in (None, row["scheme"])):
            times.setdefault((row["layer"], row["m"]), {})[row["kernel"]] = row["us"]
    lines: dict[str, list[tuple[int, float]]] = {}
    for (layer, m), us in sorted(times.items()):
        peers = [us[name] for name in PEERS if name in us]
        if peers and "vllm-sparse" in us:
            lines.setdefault(layer, []).append((m, min(peers) / us["vllm-sparse"]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--scheme", help="of vllm-sparse, where the file has several")
    arguments = parser.parse_args()
    import matplotlib.pyplot as plt

    report = json.loads(arguments.report.read_text())
    figure, axes = plt.subplots(figsize=(7, 4))
    for layer, points in speedups(report, arguments.model, arguments.scheme).items():
        axes.plot(*zip(*points, strict=True), marker="o", label=layer)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens", ylabel="times the fastest dense kernel", title=arguments.model)
    axes.legend()
    figure.savefig(arguments.report.with_suffix(".svg"), bbox_inches="tight")


if __name__ == "__main__":
    main()
