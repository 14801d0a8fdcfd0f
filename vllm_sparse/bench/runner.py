"""Walk through the models, round by round; keep every result at once, and go on when a model fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_sparse.bench import accuracy, offline
from vllm_sparse.bench.machine import idle_check
from vllm_sparse.bench.process import Worker
from vllm_sparse.bench.progress import Progress
from vllm_sparse.bench.server import Server, serving
from vllm_sparse.bench.serving import CLIENT, FRACTIONS, Point, Sweep, measure, sustained
from vllm_sparse.bench.settings import Settings
from vllm_sparse.bench.store import Row, Store
from vllm_sparse.bench.targets import Target
from vllm_sparse.errors import EngineError, SparseError

_LOAD_COST = 300.0  # of starting an engine or a server, in tokens of one stream
_ACCURACY_COST = 300.0


class Runner:
    """One run: what is not in the store yet is measured, in an order that gives every model its turn.

    Args:
        settings: what is measured.
        targets: the models, the baseline first.
        store: where results are kept.
        out: directory for logs and raw samples.
    """

    def __init__(self, settings: Settings, targets: Sequence[Target], store: Store, out: Path) -> None:
        self._settings, self._targets, self._store = settings, list(targets), store
        self._logs, self._raw = out / "logs", out / "raw"
        self._out = out
        self._engines: dict[str, offline.Engine] = {}
        self._client: Worker | None = None
        self._loaded: set[str] = set()
        self._failed: set[tuple[str, str]] = set()
        self._sweep = Sweep(settings, store, targets[0].label)
        self._progress = Progress(self._cost())

    def run(self) -> int:
        """Measure; return the number of failures."""
        for sentence in idle_check(1.0, gpus=True):
            self._warn(sentence)
        try:
            if self._settings.resident:
                self._load_all()
            for walk in range(self._settings.walks):
                for target in self._order(walk):
                    self._offline(target, walk)
            self._close_engines()
            for walk in range(self._settings.rounds):
                for target in self._order(walk):
                    self._served(target, walk)
        finally:
            self._close_engines()
            if self._client is not None:
                self._client.close()
        return len(self._store.data["failures"])

    def _order(self, walk: int) -> list[Target]:
        return self._targets if walk % 2 == 0 else self._targets[::-1]

    def _warn(self, sentence: str) -> None:
        if sentence.split(":")[0] not in {known.split(":")[0] for known in self._store.data["warnings"]}:
            self._store.warn(sentence)
            self._progress.say(f"warning: {sentence}")

    def _fail(self, target: Target, stage: str, key: Row, error: SparseError) -> None:
        self._failed.add((target.label, stage))
        self._store.fail(key, error)
        self._progress.say(f"failed: {error}")

    # --- offline -------------------------------------------------------------------------------------------------

    def _offline_jobs(self, target: Target, walk: int) -> list[offline.Job]:
        if target.is_endpoint or (target.label, "offline") in self._failed:
            return []
        return [job for job in offline.plan(self._settings, target, walk) if not self._store.has(job.key)]

    def _offline(self, target: Target, walk: int) -> None:
        jobs = self._offline_jobs(target, walk)
        try:
            if jobs:
                self._engine(target)
                for sentence in idle_check():
                    self._warn(sentence)
            for job in jobs:
                row = self._engine(target).measure(job)
                self._keep(row)
                times = " ".join(f"{seconds:.3f}" for seconds in row["seconds"])
                self._progress.done(job.cost, f"{job.suite} {job.case.name} {job.model}: {times} s")
        except EngineError as error:
            self._fail(target, "offline", {"suite": "offline", "model": target.label, "round": walk}, error)
        finally:
            if not self._settings.resident or (target.label, "offline") in self._failed:
                self._close_engine(target.label)

    def _engine(self, target: Target) -> offline.Engine:
        """Return the loaded engine of ``target``; a resident run starts all of them at the same time."""
        if target.label not in self._engines:
            for each in self._targets if self._settings.resident else [target]:
                if each.label not in self._engines and (each.label, "offline") not in self._failed:
                    self._progress.say(f"loading {each.label}")
                    log = self._logs / f"engine-{each.label}.log"
                    self._engines[each.label] = offline.Engine(each, self._settings, log)
        if target.label not in self._loaded:
            self._wait(target)
        return self._engines[target.label]

    def _load_all(self) -> None:
        """Load the engines of a resident run before anything is timed."""
        for target in self._targets:
            if any(self._offline_jobs(target, walk) for walk in range(self._settings.walks)):
                try:
                    self._engine(target)
                except EngineError as error:
                    self._fail(target, "offline", {"suite": "offline", "model": target.label, "round": 0}, error)
                    self._close_engine(target.label)

    def _wait(self, target: Target) -> None:
        facts = self._engines[target.label].wait()
        self._loaded.add(target.label)
        key = {"suite": "memory", "model": target.label}
        if not self._store.has(key):
            files = Path(target.source).glob("*.safetensors")
            disk = sum(file.stat().st_size for file in files) or None
            self._store.add(key | {"disk_bytes": disk} | facts)
        self._progress.done(_LOAD_COST, f"loaded {target.label} in {facts['load_seconds']:.0f} s")

    def _close_engine(self, label: str) -> None:
        self._loaded.discard(label)
        engine = self._engines.pop(label, None)
        if engine is not None:
            engine.close()

    def _close_engines(self) -> None:
        for engine in self._engines.values():
            engine.worker.finish()  # so that they end at the same time
        for label in list(self._engines):
            self._close_engine(label)

    def _keep(self, row: Row) -> None:
        self._store.add(row)
        for sentence in row["warnings"]:
            self._warn(sentence)

    # --- served --------------------------------------------------------------------------------------------------

    def _missing_accuracy(self, target: Target, walk: int) -> list[Row]:
        if "accuracy" not in self._settings.suites or walk or target.dummy:
            return []
        wanted = [{"suite": "perplexity", "model": target.label}] if self._settings.text else []
        if self._settings.tasks:
            wanted.append({"suite": "tasks", "model": target.label})
        return [key for key in wanted if not self._store.has(key)]

    def _missing_points(self, target: Target, walk: int) -> bool:
        """Return whether a load is missing, as far as that is known before the server runs."""
        cases = self._settings.batch_cases if "serve" in self._settings.suites else ()
        return any(
            not self._store.has(point.key) for case in cases for point in self._sweep.points(target.label, case, walk)
        )

    def _served(self, target: Target, walk: int) -> None:
        accuracy_keys, points = self._missing_accuracy(target, walk), self._missing_points(target, walk)
        if (target.label, "served") in self._failed or not (accuracy_keys or points):
            return
        self._progress.say(f"serving {target.label}")
        key: Row = {"suite": "serve", "model": target.label, "round": walk}
        try:
            options = self._settings.arguments(target)
            log = self._logs / f"server-{target.label}.log"
            with serving(target, options, log, self._settings.startup_seconds) as server:
                self._progress.done(_LOAD_COST, f"{target.label} is served at {server.url}")
                for wanted in accuracy_keys:
                    key = wanted
                    self._accuracy(server, wanted)
                if points:
                    key = {"suite": "serve", "model": target.label, "round": walk}
                    self._sweep_server(server, target, walk)
        except EngineError as error:
            self._fail(target, "served", key, error)

    def _accuracy(self, server: Server, key: Row) -> None:
        settings = self._settings
        if key["suite"] == "perplexity":
            result = accuracy.perplexity(server, settings)
            told = f"perplexity {server.label}: {result['perplexity']:.3f}"
        else:
            out = self._raw / f"tasks-{server.label}"
            result = {"tasks": accuracy.tasks(server, settings, out, self._logs / f"tasks-{server.label}.log")}
            told = f"tasks {server.label}: {', '.join(result['tasks'])}"
        self._store.add(key | result)
        self._progress.done(_ACCURACY_COST, told)

    def _sweep_server(self, server: Server, target: Target, walk: int) -> None:
        if self._client is None:
            self._client = Worker("vllm bench serve", CLIENT, self._logs / "client.log")
            self._client.wait_ready(self._settings.startup_seconds)
        for case in self._settings.batch_cases:
            for point in self._sweep.points(target.label, case, walk):
                if not self._store.has(point.key):
                    self._measure_point(self._client, server, point)

    def _measure_point(self, client: Worker, server: Server, point: Point) -> None:
        row = measure(client, server, point, self._raw)
        self._keep(row)
        load = point.arrival if point.rate is None else f"{point.arrival} {point.rate:g}/s"
        itl = f"{row['itl_ms']['p50']:.2f} ms" if row.get("itl_ms") else "-"
        kept_up = "" if point.rate is None or sustained(row, row["e2el_ms"]["p50"] / 1e3) else ", saturated"
        told = f"serve {point.case.name} {load} {point.model}: {row['qps']:.3g} queries/s, ITL {itl}{kept_up}"
        self._progress.done(self._point_cost(point), told)

    def _point_cost(self, point: Point) -> float:
        if point.rate is None:
            streams = 1 if point.arrival == "single" else point.requests
            one = point.case.output + point.case.prompt / 50
            return point.requests * one if streams == 1 else one * (1 + streams / 8)
        return 30 * self._settings.seconds

    # --- cost ----------------------------------------------------------------------------------------------------

    def _cost(self) -> float:
        """Return the cost of all that is missing, in tokens of one stream, roughly."""
        settings, total = self._settings, 0.0
        for walk in range(settings.walks):
            for target in self._targets:
                jobs = self._offline_jobs(target, walk)
                loads = bool(jobs) and (walk == 0 or not settings.resident)
                total += sum(job.cost for job in jobs) + _LOAD_COST * loads
        for walk in range(settings.rounds):
            for target in self._targets:
                accuracy_jobs, points = len(self._missing_accuracy(target, walk)), self._missing_points(target, walk)
                total += _ACCURACY_COST * accuracy_jobs + _LOAD_COST * bool(accuracy_jobs or points)
                total += self._sweep_cost(target, walk) * points
        return total

    def _sweep_cost(self, target: Target, walk: int) -> float:
        settings = self._settings
        rates = (len(settings.rates) or len(FRACTIONS)) * len(settings.arrivals)
        first = [
            self._point_cost(Point(target.label, case, arrival, None, requests, walk))
            for case in settings.batch_cases
            for arrival, requests in (("single", 3), ("at-once", settings.requests))
        ]
        return sum(first) + rates * 30 * settings.seconds * len(settings.batch_cases)
