"""Offline suites on an engine in a subprocess: one request (latency), and many at once (throughput).

A latency sample is two requests with the same prompt: one for the whole output, and one that ends with its first token.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparse.bench.machine import gpu_states, throttle_check
from vllm_sparse.bench.process import Worker
from vllm_sparse.bench.settings import Settings
from vllm_sparse.bench.store import Row
from vllm_sparse.bench.targets import Target
from vllm_sparse.bench.use_cases import UseCase

ENGINE = (sys.executable, "-m", "vllm_sparse.bench.engine")
_WARM_UP_TOKENS = 16
_PLUGIN = re.compile(r"sparse24: (\d+ of \d+ linear layers run .+)")
_SECONDS = 1800.0  # that one batch may take


@dataclass(frozen=True)
class Job:
    """One offline measurement of one model in one round."""

    suite: str
    model: str
    case: UseCase
    round: int
    requests: int
    samples: int

    @property
    def key(self) -> Row:
        """What identifies its row."""
        return {"suite": self.suite, "model": self.model, "use_case": self.case.name, "round": self.round}

    @property
    def cost(self) -> float:
        """Its work in tokens of one stream, roughly: a batch of b streams takes as long as 1 + b / 8 of them."""
        one = self.case.output + self.case.prompt / 50
        return self.samples * one * (1 if self.requests == 1 else 1 + self.requests / 8)


def plan(settings: Settings, target: Target, walk: int) -> list[Job]:
    """Return the offline jobs of ``target`` in one walk through the models."""
    jobs = []
    if "latency" in settings.suites:
        jobs += [("latency", case, 1) for case in settings.latency_cases]
    if "throughput" in settings.suites:
        jobs += [("throughput", case, settings.requests) for case in settings.batch_cases]
    return [Job(suite, target.label, case, walk, n, settings.samples_per_round) for suite, case, n in jobs]


class Engine:
    """A loaded model, warmed up for each shape of request before its first sample."""

    def __init__(self, target: Target, settings: Settings, log: Path) -> None:
        self._settings = settings
        self._warm: set[tuple[str, str]] = set()
        command = [*ENGINE, "--model", target.source, *settings.arguments(target)]
        self._log = log
        self.worker = Worker(target.label, command, log)

    def wait(self) -> dict[str, Any]:
        """Wait until it is loaded; return seconds of loading, bytes, tokens of KV cache, and what the plugin said."""
        facts = self.worker.wait_ready(self._settings.startup_seconds)
        said = _PLUGIN.findall(self._log.read_text(encoding="utf-8", errors="replace"))
        return facts | {"plugin": list(dict.fromkeys(said))}

    def _ask(self, job: Job, output: int, seed: int) -> dict[str, Any]:
        request = {"requests": job.requests, "prompt": job.case.prompt, "output": output, "seed": seed}
        return self.worker.ask(request, _SECONDS)

    def measure(self, job: Job) -> Row:
        """Return the row of ``job``: seconds of every sample, GPU states after each, and warnings."""
        if (job.suite, job.case.name) not in self._warm:
            self._ask(job, min(_WARM_UP_TOKENS, job.case.output), seed=10_000)
            self._warm.add((job.suite, job.case.name))
        warnings: set[str] = set()
        seconds, first_token, states = [], [], []
        for sample in range(job.samples):
            seed = job.round * job.samples + sample
            seconds.append(self._ask(job, job.case.output, seed)["seconds"])
            states.append(gpu_states())
            if job.suite == "latency":
                first_token.append(self._ask(job, 1, seed)["seconds"])
            warnings.update(throttle_check(states[-1]))
        shape = {"requests": job.requests, "prompt": job.case.prompt, "output": job.case.output}
        times = {"seconds": seconds} | ({"first_token": first_token} if first_token else {})
        return {**job.key, **shape, **times, "gpu": states, "warnings": sorted(warnings)}

    def close(self) -> None:
        """Unload it."""
        self.worker.close()
