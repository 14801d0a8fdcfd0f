"""Tables of what ``benchmarks/results/*/*.json`` hold, one or more for every file (see ``benchmarks.report``)."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.plot_compress import PHASES
from vllm_sparse.bench.report import (
    accuracy_table,
    decode_table,
    first_token_table,
    latency_table,
    memory_table,
    served_tables,
    table,
    throughput_table,
)
from vllm_sparse.bench.store import SCHEMA
from vllm_sparse.bench.summary import Summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "vllm-sparse"
SPARSE = (OURS, "vllm-sparse-mma", "cusparselt")
LAYERS = ("qkv", "o", "gate_up", "down")
MOST_COLUMNS = 16
Key = tuple[str, str, int]  # kernel, scheme, tokens
RANGES = ((1, 16), (17, 64), (65, 128), (129, 256), (257, 512), (513, 1024), (1025, 4096))


def described(data: dict[str, Any], file: Path) -> str:
    """Return date, versions and a link, from the repository's root, of a results file."""
    versions = data.get("versions", {})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
    return f"{str(data['date'])[:10]}, {listed} ([{file.name}]({file.relative_to(ROOT)}))"


def layer_times(data: dict[str, Any]) -> dict[str, dict[Key, dict[str, float]]]:
    """Return ``{model: {(kernel, scheme, tokens): {layer: microseconds}}}``."""
    times: dict[str, dict[Key, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in data["rows"]:
        times[row["model"]][row["kernel"], row["scheme"], row["m"]][row["layer"]] = row["us"]
    return times


def sums_of(times: dict[Key, dict[str, float]]) -> dict[Key, float]:
    """Return the microseconds of all layers; a kernel that lacks a layer at some number of tokens has no sum there."""
    return {key: sum(layers.values()) for key, layers in times.items() if set(layers) >= set(LAYERS)}


def dense_of(sums: dict[Key, float], scheme: str) -> list[tuple[str, str]]:
    """Return the dense kernels of ``scheme``, or of every scheme where it has none, with their schemes."""
    dense = sorted({key[:2] for key in sums if key[0] not in SPARSE})
    return [kind for kind in dense if kind[1] == scheme] or dense


def bf16_of(sums: dict[Key, float]) -> list[tuple[str, str]]:
    """Return the dense kernels of bf16, which there may be none of."""
    return [kind for kind in dense_of(sums, "bf16") if kind[1] == "bf16"]


def linear(data: dict[str, Any], file: Path) -> list[str]:
    """Return one table per model: microseconds of the sum over a block's linear layers, against tokens.

    Ratios are to the fastest dense kernel of the same scheme, or of any scheme where there is none, and to the
    fastest of bf16.
    """
    parts = []
    for model, found in layer_times(data).items():
        if len({m for _, _, m in found}) > MOST_COLUMNS:
            parts += _sweep(model, found, described(data, file))
            continue
        sums = sums_of(found)
        ours = sorted({scheme for kernel, scheme, _ in sums if kernel == OURS})
        tokens = sorted({m for kernel, _, m in sums if kernel == OURS})
        if not tokens:
            continue
        kinds = sorted({key[:2] for key in sums}, key=lambda kind: (kind[0] == OURS, kind))
        rows = [
            [named(kernel, scheme), *(_micro(sums.get((kernel, scheme, m))) for m in tokens)]
            for kernel, scheme in kinds
        ]
        for scheme in ours:
            rows.append([f"{scheme}: best dense / ours", *ratios(sums, dense_of(sums, scheme), scheme, tokens)])
            rows.append([f"{scheme}: bf16 / ours", *ratios(sums, bf16_of(sums), scheme, tokens)])
        head = f"**{model}**: microseconds of one block's four linear layers; {described(data, file)}"
        parts += [head, "", table(["tokens", *map(str, tokens)], rows), ""]
    plots = [file.with_suffix(".svg"), *sorted(file.parent.glob(f"{file.stem}-*.svg"))]
    return parts + [f"![{plot.stem}]({plot.relative_to(ROOT)})\n" for plot in plots if plot.exists()]


def _sweep(model: str, times: dict[Key, dict[str, float]], source: str) -> list[str]:
    """Return a table of many numbers of tokens: the layer that gains least over the fastest dense kernel."""
    schemes = sorted({scheme for kernel, scheme, _ in times if kernel == OURS})
    rows = []
    for scheme in schemes:
        cells = []
        for low, high in RANGES:
            gains = []
            for m in sorted({m for kernel, of, m in times if (kernel, of) == (OURS, scheme) and low <= m <= high}):
                for layer, us in times[OURS, scheme, m].items():
                    kinds = [kind for kind in times if kind[0] not in SPARSE and kind[1:] == (scheme, m)]
                    dense = min((times[kind][layer] for kind in kinds if layer in times[kind]), default=None)
                    gains += [(dense / us, f"{layer}, {m}")] if dense else []
            cells.append("{:.2f}x ({})".format(*min(gains)) if gains else "–")
        rows.append([scheme, *cells])
    count = len({m for _, _, m in times})
    head = f"**{model}**, {count} numbers of tokens: the layer that gains least over the fastest dense kernel"
    return [f"{head}; {source}", "", table(["tokens", *(f"{low} … {high}" for low, high in RANGES)], rows), ""]


def named(kernel: str, scheme: str) -> str:
    """Return a kernel's name with its scheme."""
    return kernel if kernel.endswith(scheme) else f"{kernel} {scheme}"


def ratios(sums: dict[Key, float], dense: list[tuple[str, str]], scheme: str, tokens: list[int]) -> list[str]:
    """Return how much faster our kernel is than the fastest of ``dense`` at each number of tokens."""
    cells = []
    for m in tokens:
        fastest = min((sums[*kind, m] for kind in dense if (*kind, m) in sums), default=None)
        own = sums.get((OURS, scheme, m))
        cells.append(f"{fastest / own:.2f}x" if fastest and own else "–")
    return cells


def _micro(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def accuracy(data: dict[str, Any], file: Path) -> list[str]:
    """Return a table of methods: mean negative log-likelihood over calibration draws, its range, validity, seconds."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in data["rows"]:
        rows[row["method"]].append(row)
    cells = []
    for method, same in rows.items():
        nll = [row["nll"] for row in same]
        seconds = [row["seconds"] for row in same if row.get("seconds") is not None]
        valid = {None: "–", True: "yes", False: "no"}[same[0].get("valid_24")]
        spread = f"{min(nll):.4f} … {max(nll):.4f}"
        time = f"{mean(seconds):.0f}" if seconds else "–"
        cells.append([method, f"{mean(nll):.4f}", spread, str(len(nll)), valid, time])
    head = f"**{Path(str(data['model'])).name}**: negative log-likelihood per token; {described(data, file)}"
    return [head, "", table(["method", "mean", "range", "draws", "valid 2:4", "seconds"], cells), ""]


def compress_speed(data: dict[str, Any], file: Path) -> list[str]:
    """Return a table of the seconds of our runs and how many times as long the rival takes."""
    rows = []
    for row in data["ratios"]:
        own = [one for one in data["rows"] if one["tool"] == "ours"]
        own = [one for one in own if (one["recipe"], one["threads"]) == (row["recipe"], row["threads"])]
        seconds = median(one["call_wall"] for one in own)
        ratios = [row.get(what) for what in ("call_wall", "call_wall_against_best", "call_cpu", "process_wall")]
        cells = ["–" if ratio is None else f"{ratio:.1f}x" for ratio in ratios]
        rows.append([f"{row['recipe']} / {row['against']}", str(row["threads"]), f"{seconds:.1f}", *cells])
    size = data["calibration"]
    versions = {f"{tool}, {name}": text for tool in ("ours", "rival") for name, text in data["versions"][tool].items()}
    head = (
        f"**{data['model']}**: seconds of compress with {size['sequences']} x {size['length']} tokens, and how many "
        f"times that {data['rival']} takes for its recipe; {described(data | {'versions': versions}, file)}"
    )
    columns = ["ours / rival's", "threads", "seconds", "same threads", "rival's best threads", "CPU", "process"]
    return [head, "", table(columns, rows), ""]


def compress_shapes(data: dict[str, Any], file: Path) -> list[str]:
    """Return a table of seconds over blocks and sequences, and the picture of both curves."""
    rows = []
    for row in data["rows"]:
        seconds = [sum(row["phases"].get(name, 0.0) for name in names) for names in PHASES.values()]
        size = f"{row['sequences']} x {row['length']}"
        rows.append([row["shapes"], str(row["blocks"]), size, f"{row['seconds']:.2f}", *(f"{x:.2f}" for x in seconds)])
    head = f"**Compressing**, {data['model']}: seconds; {described(data, file)}"
    names = [", ".join(names) for names in PHASES.values()]
    parts = [head, "", table(["shapes", "blocks", "tokens", "all", *names], rows), ""]
    plot = file.with_suffix(".svg")
    return parts + ([f"![{plot.stem}]({plot.relative_to(ROOT)})\n"] if plot.exists() else [])


def serving(data: dict[str, Any], file: Path) -> list[str]:
    """Return the latency, throughput, accuracy and memory tables of one run of ``vllm-sparse bench``."""
    summary = Summary(data)
    titles = {
        "seconds of one request": latency_table(summary),
        "milliseconds to the first token": first_token_table(summary),
        "tokens per second after it": decode_table(summary),
        f"requests per second, {data['arguments']['requests']} at once": throughput_table(summary),
        "accuracy": accuracy_table(summary),
        "memory": memory_table(summary),
    }
    titles |= dict(served_tables(summary))
    parts = []
    for title, text in titles.items():
        if text is not None:
            parts += [f"**vLLM, {title}**; {described(data, file)}", "", text, ""]
    return parts


def section(results: Path) -> str:
    """Return the section's Markdown: one heading per machine, its results below it."""
    lines = []
    for machine in sorted(folder for folder in results.iterdir() if folder.is_dir()):
        parts = []
        for file in sorted(machine.glob("*.json")):
            data = json.loads(file.read_text(encoding="utf-8"))
            if data.get("schema") == SCHEMA:
                parts += serving(data, file)
            elif file.name.startswith("linear-"):
                parts += linear(data, file)
            elif file.name.startswith("accuracy-"):
                parts += accuracy(data, file)
            elif file.name.startswith("compress-speed-"):
                parts += compress_speed(data, file)
            elif file.name.startswith("compress-"):
                parts += compress_shapes(data, file)
        if parts:
            lines += [f"### {machine.name}", "", *parts]
    return "\n".join(lines).strip()
