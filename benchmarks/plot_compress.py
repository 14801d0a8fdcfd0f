"""Draw what compressing costs against blocks and against calibration tokens, from a file of compress_shapes.

python -m benchmarks.plot_compress benchmarks/results/h200/compress-llama-shapes.json

Two pictures side by side in <file>.svg: seconds of all phases, of those that see every token (calibrate, propagate),
and of those that solve (prune, quantize), with the straight line through each by least squares.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

PHASES = {"tokens": ("calibrate", "propagate"), "solving": ("prune", "quantize")}
Points = list[tuple[float, dict[str, float]]]


def parts(row: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of a run: all, and those of each part."""
    phases = row["phases"]
    return {"all": row["seconds"]} | {
        part: sum(phases.get(name, 0.0) for name in names) for part, names in PHASES.items()
    }


def curves(rows: list[dict[str, Any]]) -> dict[str, tuple[str, Points]]:
    """Return by what is varied a line on what is not, and the points in order: of the shapes with most rows."""
    shapes = Counter(row["shapes"] for row in rows).most_common(1)[0][0]
    same = [row for row in rows if row["shapes"] == shapes]
    sequences = Counter(row["sequences"] for row in same).most_common(1)[0][0]
    blocks = Counter(row["blocks"] for row in same).most_common(1)[0][0]
    by_blocks = sorted((row["blocks"], parts(row)) for row in same if row["sequences"] == sequences)
    by_tokens = sorted((row["sequences"] * row["length"] / 1e6, parts(row)) for row in same if row["blocks"] == blocks)
    length = same[0]["length"]
    return {
        "blocks": (f"{shapes}, {sequences} x {length} tokens", by_blocks),
        "million calibration tokens": (f"{shapes}, {blocks} blocks", by_tokens),
    }


def line(points: Points, part: str) -> tuple[float, float, float]:
    """Return slope and intercept of the line through ``part`` of ``points``, and its largest distance in seconds."""
    x, y = np.array([point[0] for point in points]), np.array([point[1][part] for point in points])
    slope, start = np.polyfit(x, y, 1)
    return float(slope), float(start), float(np.abs(slope * x + start - y).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    file = parser.parse_args().report
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    plt.rcParams["svg.hashsalt"] = file.stem  # the same picture is the same file
    report = json.loads(file.read_text())
    figure, both = plt.subplots(1, 2, figsize=(10, 4))
    for axes, (what, (title, points)) in zip(both, curves(report["rows"]).items(), strict=True):
        for part in ("all", *PHASES):
            slope, start, far = line(points, part)
            x = [point[0] for point in points]
            (drawn,) = axes.plot(x, [point[1][part] for point in points], marker="o", linestyle="", label=part)
            axes.plot([0, x[-1]], [start, start + slope * x[-1]], color=drawn.get_color(), linewidth=1)
            print(f"{what}, {part}: {start:.2f} + {slope:.2f} s each, no point further than {far:.2f} s")
        axes.set(xlabel=what, ylabel="seconds", xlim=(0, None), ylim=(0, None), title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=what == "blocks"))
    both[0].legend()
    figure.suptitle(f"{report['machine']}, {report['options']['scheme']}")
    figure.tight_layout()
    figure.savefig(file.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
