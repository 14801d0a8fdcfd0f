"""What one run measures and how, the same for every model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparse.bench.targets import Target
from vllm_sparse.bench.use_cases import UseCase
from vllm_sparse.errors import OptionError

SUITES = ("latency", "throughput", "serve", "accuracy")
ARRIVALS = {"constant": "inf", "poisson": "1"}  # vLLM's "burstiness" of each
_MARGIN = 8  # positions beyond the longest sequence


@dataclass(frozen=True)
class Settings:
    """The measurement, the same for every model.

    Attributes:
        suites: which of ``SUITES``.
        latency_cases: single requests are timed with these.
        batch_cases: throughput and serving use these.
        repeats: timed samples of each offline measurement.
        rounds: how often the list of models is walked through, every second time backwards.
        resident: all engines stay loaded, and the models take turns, one sample of each measurement at a time.
        requests: requests sent at once, for throughput and for the saturated server.
        rates: requests per second to serve at; empty: fractions of the first model's saturation.
        arrivals: how requests arrive, of ``ARRIVALS``.
        seconds: how long each rate is held.
        text: file whose perplexity is measured, or None.
        text_tokens: how many of its tokens.
        window: tokens of one sequence of it.
        tasks: lm-evaluation-harness tasks.
        task_path: directory of further tasks as YAML files, or None.
        task_limit: documents of each task, or None for all.
        engine_args: vLLM arguments of all models.
        startup_seconds: how long an engine or a server may take to load.
    """

    suites: tuple[str, ...]
    latency_cases: tuple[UseCase, ...]
    batch_cases: tuple[UseCase, ...]
    repeats: int
    rounds: int
    resident: bool
    requests: int
    rates: tuple[float, ...]
    arrivals: tuple[str, ...]
    seconds: float
    text: Path | None
    text_tokens: int
    window: int
    tasks: tuple[str, ...]
    task_path: Path | None
    task_limit: int | None
    engine_args: str
    startup_seconds: float

    @property
    def samples_per_round(self) -> int:
        """Timed samples of one offline measurement in one round."""
        return 1 if self.resident else -(-self.repeats // self.rounds)

    @property
    def walks(self) -> int:
        """How often the list of models is walked through by the offline suites."""
        return self.repeats if self.resident else self.rounds

    @property
    def positions(self) -> int:
        """The longest sequence that any suite needs."""
        lengths = [case.tokens for case in self.latency_cases if "latency" in self.suites]
        if {"throughput", "serve"} & set(self.suites):
            lengths += [case.tokens for case in self.batch_cases]
        if "accuracy" in self.suites and self.text is not None:
            lengths.append(self.window + 1)
        return max(lengths, default=2048 - _MARGIN) + _MARGIN

    def arguments(self, target: Target) -> list[str]:
        """Return the vLLM arguments of ``target``: the same for all, then its own."""
        given = shlex.split(self.engine_args)
        common = ["--no-enable-prefix-caching", "--seed", "0"]
        if not any(argument.split("=")[0] == "--max-model-len" for argument in given):
            common += ["--max-model-len", str(self.positions)]
        return [*common, *given, *target.options]

    def to_json(self) -> dict[str, Any]:
        """Return what the results keep."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("latency_cases", "batch_cases"):
            data[name] = [[case.name, case.prompt, case.output] for case in data[name]]
        return dict(json.loads(json.dumps(data, default=str)))


def check_positions(settings: Settings, targets: Sequence[Target]) -> None:
    """Raise OptionError if a use case is longer than a model's context."""
    for target in targets:
        file = Path(target.source) / "config.json"
        if target.is_endpoint or not file.exists():
            continue
        limit = json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings")
        if isinstance(limit, int) and settings.positions > limit:
            longest = max((*settings.latency_cases, *settings.batch_cases), key=lambda case: case.tokens)
            raise OptionError(
                f"{target.label}: has {limit} positions, but {longest.name} and the other use cases need "
                f"{settings.positions}: give a smaller --scale, or --use-case without the longest"
            )
