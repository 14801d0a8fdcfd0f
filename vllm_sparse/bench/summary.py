"""Figures of one run: medians with their spread, and ratios to the baseline of the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from vllm_sparse.bench.serving import AT_ONCE, SINGLE, sustained
from vllm_sparse.bench.store import Row

LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Figure:
    """The median of some samples, the lowest, the highest, and how many there are."""

    value: float
    low: float
    high: float
    samples: int

    @property
    def spread(self) -> float:
        """Half the range of the samples, relative to the median."""
        return (self.high - self.low) / 2 / self.value if self.value else 0.0

    @classmethod
    def of(cls, samples: Sequence[float]) -> Figure | None:
        """Return the figure of ``samples``; None if there are none."""
        return cls(median(samples), min(samples), max(samples), len(samples)) if samples else None


class Summary:
    """What a results file says, by model and use case.

    Args:
        data: the content of ``bench.json``.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.models = [target["label"] for target in data["targets"]]

    @property
    def baseline(self) -> str:
        """The first model, which ratios are relative to."""
        return str(self.models[0])

    def rows(self, suite: str, **key: Any) -> list[Row]:
        """Return the rows of a suite with all of ``key``'s values."""
        found = (row for row in self.data["rows"] if row["suite"] == suite)
        return [row for row in found if all(row.get(name) == value for name, value in key.items())]

    def cases(self, suite: str) -> list[tuple[str, int, int]]:
        """Return (name, prompt tokens, output tokens) of the use cases that have rows of ``suite``."""
        arguments = self.data["arguments"]
        listed = arguments["latency_cases" if suite == "latency" else "batch_cases"]
        return [(name, prompt, output) for name, prompt, output in listed if self.rows(suite, use_case=name)]

    def latency(self, model: str, case: str) -> Figure | None:
        """Seconds of one request."""
        rows = self.rows("latency", model=model, use_case=case)
        return Figure.of([seconds for row in rows for seconds in row["seconds"]])

    def first_token(self, model: str, case: str) -> Figure | None:
        """Milliseconds to the first token of one request."""
        rows = self.rows("latency", model=model, use_case=case)
        return Figure.of([1e3 * seconds for row in rows for seconds in row.get("first_token", [])])

    def decode(self, model: str, case: str) -> Figure | None:
        """Tokens per second of one request after its first token."""
        rows = self.rows("latency", model=model, use_case=case)
        pairs = [(row, *pair) for row in rows for pair in zip(row["seconds"], row.get("first_token", []), strict=False)]
        return Figure.of([(row["output"] - 1) / (whole - first) for row, whole, first in pairs if whole > first])

    def throughput(self, model: str, case: str) -> Figure | None:
        """Requests per second of a batch."""
        rows = self.rows("throughput", model=model, use_case=case)
        return Figure.of([row["requests"] / seconds for row in rows for seconds in row["seconds"]])

    def served(self, model: str, case: str, arrival: str, metric: str, percentile: str) -> Figure | None:
        """A percentile of "ttft", "itl" or "tpot" in milliseconds, over rounds, of a load without a rate."""
        rows = self.rows("serve", model=model, use_case=case, arrival=arrival, rate=None)
        return Figure.of([row[f"{metric}_ms"][percentile] for row in rows if row["completed"]])

    def saturation(self, model: str, case: str) -> Figure | None:
        """Requests per second of the server when all requests come at once."""
        rows = self.rows("serve", model=model, use_case=case, arrival=AT_ONCE)
        return Figure.of([row["qps"] for row in rows if row["completed"] and not row["failed"]])

    def curve(self, model: str, case: str, arrival: str) -> list[tuple[float, float, float]]:
        """Return (queries/s reached, median ITL, p99 ITL) in milliseconds at each rate, medians over rounds."""
        rows = self.rows("serve", model=model, use_case=case, arrival=arrival)
        rates = sorted({row["rate"] for row in rows if row["completed"] and not row["failed"]})
        points = []
        for rate in rates:
            same = [row for row in rows if row["rate"] == rate and row["completed"] and not row["failed"]]
            itl = [median(row["itl_ms"][key] for row in same) for key in ("p50", "p99")]
            points.append((median(row["qps"] for row in same), itl[0], itl[1]))
        return points

    def best_rate(self, model: str, case: str, arrival: str, limit_ms: float) -> float | None:
        """Return the highest rate that was sustained, in every round, with a median ITL within ``limit_ms``."""
        single = self.served(model, case, SINGLE, "e2el", "p50")
        rows = self.rows("serve", model=model, use_case=case, arrival=arrival)
        if single is None or not rows:
            return None
        rates = {row["rate"] for row in rows}
        bad = {row["rate"] for row in rows if not sustained(row, single.value / 1e3) or row["itl_ms"]["p50"] > limit_ms}
        return max(rates - bad, default=0.0)

    def ratio(self, figure: Figure | None, base: Figure | None, lower_is_better: bool = False) -> float | None:
        """Return how many times better ``figure`` is than ``base``; None if one of them is missing."""
        if figure is None or base is None or not figure.value or not base.value:
            return None
        return base.value / figure.value if lower_is_better else figure.value / base.value

    def mean_ratio(
        self, suite: str, model: str, figure: Callable[[str, str], Figure | None], lower_is_better: bool = False
    ) -> float | None:
        """Return the mean of a model's ratios to the baseline over the use cases of a suite; None if one is missing."""
        ratios = [
            self.ratio(figure(model, name), figure(self.baseline, name), lower_is_better)
            for name, _, _ in self.cases(suite)
        ]
        known = [ratio for ratio in ratios if ratio is not None]
        return mean(known) if known and len(known) == len(ratios) else None

    def accuracy(self) -> dict[tuple[str, str], dict[str, float]]:
        """Return ``{(task, metric): {model: value}}``, the text's perplexity first."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        for row in self.rows("perplexity"):
            found.setdefault(("text", "perplexity"), {})[row["model"]] = row["perplexity"]
        for row in self.rows("tasks"):
            for task, metrics in row["tasks"].items():
                for metric, value in metrics.items():
                    if "stderr" not in metric and metric != "alias" and not metric.startswith("sample"):
                        found.setdefault((task, metric), {})[row["model"]] = value
        return found

    def recovery(self, metric: str, values: Mapping[str, float], model: str) -> float | None:
        """Return what is left of the baseline's accuracy in per cent; for perplexity, dense / sparse."""
        base, value = values.get(self.baseline), values.get(model)
        if not base or not value:
            return None
        return 100 * (base / value if metric in LOWER_IS_BETTER else value / base)
