"""The report's pictures, as PNG and SVG; without matplotlib there are none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_sparse.bench.summary import Figure, Summary

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")
_DASHES = {"constant": "-", "poisson": "--"}


def draw(summary: Summary, out: Path) -> list[Path]:
    """Draw what was measured into ``out``; return the PNG files. Empty where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    pictures = [
        _bars(summary, out, "latency", summary.latency, "seconds of one request", "lower is better"),
        _bars(summary, out, "throughput", summary.throughput, "requests per second", "higher is better"),
        *(_itl(summary, out, case) for case in summary.cases("serve")),
        _memory(summary, out),
    ]
    return [picture for picture in pictures if picture is not None]


def _save(figure: Any, out: Path, name: str) -> Path:
    import matplotlib.pyplot as plt

    for suffix in ("svg", "png"):
        figure.savefig(out / f"{name}.{suffix}", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return out / f"{name}.png"


def _axes(width: float = 8.0) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, 4.2))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _machine(summary: Summary) -> str:
    machine = summary.data["machine"]
    return str(machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"])


def _bars(
    summary: Summary, out: Path, suite: str, value: Callable[[str, str], Figure | None], unit: str, better: str
) -> Path | None:
    """Draw groups of bars, one group per use case, one bar per model, with its ratio to the baseline above."""
    cases = summary.cases(suite)
    if not cases:
        return None
    figure, axes = _axes(max(6.0, 0.28 * len(cases) * (len(summary.models) + 1.5) + 2))
    width = 0.84 / len(summary.models)
    for index, model in enumerate(summary.models):
        colour, shift = _COLOURS[index % len(_COLOURS)], (index + 0.5) * width - 0.42
        axes.plot([], [], "s", color=colour, label=model)  # in the legend even if nothing of it was measured
        for group, (name, _, _) in enumerate(cases):
            found = value(model, name)
            if found is None:
                continue
            axes.bar(group + shift, found.value, width * 0.92, color=colour)
            ends = [[found.value - found.low], [found.high - found.value]]
            axes.errorbar(group + shift, found.value, ends, fmt="none", ecolor="#666666", elinewidth=0.8)
            ratio = summary.ratio(found, value(summary.baseline, name), suite == "latency") if index else None
            if ratio is not None:
                axes.annotate(f"{ratio:.2f}x", (group + shift, found.high), (0, 4), textcoords="offset points",
                              ha="center", va="bottom", fontsize=6.5, rotation=90)  # fmt: skip
    axes.set_xticks(range(len(cases)), [f"{name}\n{prompt}+{output}" for name, prompt, output in cases], fontsize=8)
    axes.set_ylabel(f"{unit} ({better})")
    axes.margins(y=0.14)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{suite.capitalize()}, {_machine(summary)}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=min(5, len(summary.models)), loc="upper center",
                bbox_to_anchor=(0.5, -0.14))  # fmt: skip
    return _save(figure, out, suite)


def _itl(summary: Summary, out: Path, case: tuple[str, int, int]) -> Path | None:
    """Draw the median inter-token latency against the queries per second that were reached."""
    name, prompt, output = case
    arguments = summary.data["arguments"]
    figure, axes = _axes(7.0)
    highest = most = 0.0
    for index, model in enumerate(summary.models):
        for arrival in arguments["arrivals"]:
            points = summary.curve(model, name, arrival)
            if points:
                qps, itl, _ = zip(*points, strict=True)
                highest, most = max(highest, *itl), max(most, *qps)
                axes.plot(qps, itl, _DASHES[arrival], marker="o", markersize=3.5, linewidth=1.4,
                          color=_COLOURS[index % len(_COLOURS)], label=f"{model}, {arrival}")  # fmt: skip
    if not highest:
        import matplotlib.pyplot as plt

        plt.close(figure)
        return None
    limit = summary.data["sla_itl_ms"]
    axes.set_ylim(0, 1.1 * max(highest, limit if limit < 4 * highest else 0))
    if limit < 4 * highest:
        axes.axhline(limit, color="#CC3311", linewidth=1, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "bottom"}
        axes.annotate(f"SLA {limit:g} ms", (0.01, limit), fontsize=8, color="#CC3311", **place)
    axes.set_xlim(0, 1.05 * most)
    axes.set_xlabel("queries per second")
    axes.set_ylabel("median inter-token latency, ms")
    axes.set_title(f"{name} {prompt}+{output}, {_machine(summary)}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _save(figure, out, f"itl-{name}")


def _memory(summary: Summary, out: Path) -> Path | None:
    """Draw the megabytes of the weights in memory."""
    rows = {row["model"]: row["weight_bytes"] for row in summary.rows("memory") if row["weight_bytes"]}
    models = [model for model in summary.models if model in rows]
    if not models:
        return None
    figure, axes = _axes(max(4.0, 1.1 * len(models) + 1.5))
    colours = [_COLOURS[summary.models.index(model) % len(_COLOURS)] for model in models]
    bars = axes.bar(models, [rows[model] / 1e6 for model in models], 0.6, color=colours)
    base = rows.get(summary.baseline)
    texts = [
        f"{rows[m] / 1e6:,.0f} MB" + (f"\n{base / rows[m]:.2f}x smaller" if base and i else "")
        for i, m in enumerate(models)
    ]
    axes.bar_label(bars, texts, fontsize=8, padding=2)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(y=0.16)
    axes.set_ylabel("weights in memory, MB")
    axes.set_title("Memory", fontsize=10)
    return _save(figure, out, "memory")
