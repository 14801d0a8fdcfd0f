"""The serve suite: one stream, all requests at once, and request rates in between, with vLLM's own client."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparse.bench.machine import gpu_states, idle_check, throttle_check
from vllm_sparse.bench.process import Worker
from vllm_sparse.bench.server import Server
from vllm_sparse.bench.settings import ARRIVALS, Settings
from vllm_sparse.bench.store import Row, Store
from vllm_sparse.bench.use_cases import UseCase
from vllm_sparse.errors import EngineError

CLIENT = (sys.executable, "-m", "vllm_sparse.bench.client")
SINGLE, AT_ONCE = "single", "at-once"
FRACTIONS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the first model's saturation
_METRICS = ("ttft", "itl", "tpot", "e2el")
_FEWEST, _MOST = 8, 1000  # requests of one rate
_SECONDS = 3600.0


@dataclass(frozen=True)
class Point:
    """One load: a use case, how requests arrive, how many a second (None: as fast as they are answered)."""

    model: str
    case: UseCase
    arrival: str
    rate: float | None
    requests: int
    round: int

    @property
    def key(self) -> Row:
        """What identifies its row."""
        return {
            "suite": "serve",
            "model": self.model,
            "use_case": self.case.name,
            "arrival": self.arrival,
            "rate": self.rate,
            "round": self.round,
        }

    def arguments(self, server: Server) -> list[str]:
        """Return the arguments of vLLM's ``bench serve``."""
        rate = "inf" if self.rate is None else f"{self.rate:g}"
        words = f"""--backend openai --endpoint /v1/completions --dataset-name random --ignore-eos --disable-tqdm
            --random-input-len {self.case.prompt} --random-output-len {self.case.output} --num-prompts {self.requests}
            --request-rate {rate} --burstiness {ARRIVALS.get(self.arrival, "1")} --temperature 0 --num-warmups 1
            --seed {self.round} --percentile-metrics {",".join(_METRICS)} --metric-percentiles 50,99 --save-detailed"""
        if self.arrival == SINGLE:
            words += " --max-concurrency 1"
        where = ["--base-url", server.url, "--model", server.model, "--tokenizer", server.tokenizer]
        return [*words.split(), *where]


def sustained(row: Mapping[str, Any], single_seconds: float) -> bool:
    """Return whether the server kept up: the requests ended soon after the last one was sent."""
    if row["failed"]:
        return False
    if row["rate"] is None:
        return True
    return bool(row["duration"] <= 1.1 * row["requests"] / row["rate"] + 3 * single_seconds)


def to_row(point: Point, result: Mapping[str, Any]) -> Row:
    """Return the row of ``point`` from what vLLM's client measured: milliseconds, samples of what succeeded."""
    errors = [error for error in result.get("errors", []) if error]
    failed = len(errors)
    good = [not error for error in result.get("errors", [])]
    times = list(zip(result.get("ttfts", []), result.get("itls", []), good, strict=False))
    row = {
        **point.key,
        "requests": point.requests,
        "prompt": point.case.prompt,
        "output": point.case.output,
        "completed": result["completed"],
        "failed": failed,
        "duration": result["duration"],
        "qps": result["request_throughput"],
        "tokens_per_s": result["output_throughput"],
        "samples": {
            "ttft_ms": [round(1e3 * ttft, 3) for ttft, _, ok in times if ok],
            "e2el_ms": [round(1e3 * (ttft + sum(itls)), 3) for ttft, itls, ok in times if ok],
        },
    }
    if failed:
        row["error"] = errors[0].strip().splitlines()[-1][:300]
    if result["completed"]:
        for metric in _METRICS:
            names = {"mean": f"mean_{metric}_ms", "p50": f"p50_{metric}_ms", "p99": f"p99_{metric}_ms"}
            row[f"{metric}_ms"] = {key: result[name] for key, name in names.items()}
    return row


class Sweep:
    """All loads of one server, from one stream to saturation.

    Args:
        baseline: label of the first model, whose saturation sets the rates of all.
    """

    def __init__(self, settings: Settings, store: Store, baseline: str) -> None:
        self._settings, self._store, self._baseline = settings, store, baseline

    def points(self, model: str, case: UseCase, walk: int) -> Iterator[Point]:
        """Yield the loads of one use case; each is chosen when those before it are measured."""
        settings = self._settings
        yield Point(model, case, SINGLE, None, max(3, settings.samples_per_round), walk)
        yield Point(model, case, AT_ONCE, None, settings.requests, walk)
        single = self._row(model, case, SINGLE, walk)
        if single is None:
            return
        for arrival in settings.arrivals:
            for rate in settings.rates or self._rates(model, case):
                requests = min(_MOST, max(_FEWEST, round(rate * settings.seconds)))
                point = Point(model, case, arrival, rate, requests, walk)
                yield point
                row = next(iter(self._store.find(point.key)), None)
                if row is None or not sustained(row, single["e2el_ms"]["p50"] / 1e3):
                    break

    def _row(self, model: str, case: UseCase, arrival: str, walk: int) -> Row | None:
        key = {"suite": "serve", "model": model, "use_case": case.name, "arrival": arrival, "round": walk}
        rows = [row for row in self._store.find(key) if row["completed"]]
        return rows[0] if rows else None

    def _rates(self, model: str, case: UseCase) -> list[float]:
        """Return the rates, from the first walk's saturation of the first model; of the model itself if it has none."""
        row = self._row(self._baseline, case, AT_ONCE, 0) or self._row(model, case, AT_ONCE, 0)
        return [] if row is None else [float(f"{fraction * row['qps']:.3g}") for fraction in FRACTIONS]


def measure(client: Worker, server: Server, point: Point, raw: Path) -> Row:
    """Put one load on the server and return its row; everything the client measured goes to a file in ``raw``.

    Raises:
        EngineError: the server ended or stopped answering, or refused every request.
    """
    warnings = idle_check()
    result = client.ask({"arguments": point.arguments(server)}, _SECONDS)
    states = gpu_states()
    row = to_row(point, result)
    raw.mkdir(parents=True, exist_ok=True)
    name = "-".join(str(value) for value in point.key.values() if value is not None)
    (raw / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    if row["failed"]:
        server.check()
        sentence = (
            f"{server.label}: the server refused {row['failed']} of {point.requests} requests "
            f"({point.case.name}, {point.arrival}): {row['error']}"
        )
        if not row["completed"]:
            raise EngineError(sentence)
        warnings.append(sentence)
    return row | {"gpu": states, "warnings": warnings + throttle_check(states)}
