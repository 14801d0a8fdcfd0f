"""``vllm-sparse bench``: measure models side by side and write a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_sparse.bench.accuracy import check_harness, read_text
from vllm_sparse.bench.machine import environment, gpu_states
from vllm_sparse.bench.report import write_report
from vllm_sparse.bench.runner import Runner
from vllm_sparse.bench.settings import ARRIVALS, SUITES, Settings, check_positions
from vllm_sparse.bench.store import Store
from vllm_sparse.bench.targets import Target, dummy_targets, dummy_variants, parse_targets
from vllm_sparse.bench.use_cases import SERVED, USE_CASES, select
from vllm_sparse.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    names = [case.name for case in USE_CASES]
    add = parser.add_argument
    add(
        "models",
        nargs="*",
        metavar="[LABEL=]MODEL",
        help="directory, hub id or URL of a running server; first: baseline",
    )
    add("-o", "--out", type=Path, required=True, metavar="DIR", help="where results, report and plots go")
    add("--suite", nargs="+", choices=(*SUITES, "all"), default=["all"], help="what to measure (default: all)")
    add("--use-case", nargs="+", choices=names, metavar="NAME", default=[],
        help=f"of {', '.join(names)} (default: all for latency, {' and '.join(SERVED)} for the others)")  # fmt: skip
    add("--batch-use-case", nargs="+", choices=names, metavar="NAME", default=[],
        help="for throughput and serve, where they differ from --use-case")  # fmt: skip
    add("--scale", type=float, default=1.0, help="multiply the use cases' lengths, for small machines (default: 1)")
    add("--dummy", type=Path, metavar="CONFIG", help="a config.json: benchmark its shape without weights, in variants")
    add(
        "--variants",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"of --dummy: {', '.join(dummy_variants())} (default: all)",
    )
    add("--repeats", type=int, default=4, help="timed samples of each offline measurement (default: 4)")
    add("--rounds", type=int, default=2, help="walks through the models, alternating in direction (default: 2)")
    add("--resident", action="store_true", help="keep all engines loaded, and take one sample of each in turn")
    add("--requests", type=int, default=256, help="requests at once for throughput and saturation (default: 256)")
    add(
        "--rates",
        nargs="+",
        type=float,
        default=[],
        help="requests/s to serve at (default: from the baseline's saturation)",
    )
    add("--arrivals", nargs="+", choices=(*ARRIVALS, "none"), default=list(ARRIVALS),
        help="none: no rates between one stream and all at once (default: constant and poisson)")  # fmt: skip
    add("--seconds", type=float, default=20.0, help="how long each rate is held (default: 20)")
    add("--sla-itl-ms", type=float, default=50.0, help="the line in the ITL plots (default: 50)")
    add("--text", type=Path, help="file whose perplexity is measured")
    add("--text-tokens", type=int, default=16384, help="how much of it (default: 16384)")
    add("--window", type=int, default=512, help="tokens of each sequence of it (default: 512)")
    add("--task", nargs="+", default=[], metavar="NAME", help="lm-evaluation-harness tasks, through the endpoint")
    add("--task-path", type=Path, metavar="DIR", help="directory with tasks of your own as YAML")
    add("--task-limit", type=int, metavar="N", help="documents of each task (default: all)")
    add("--engine-args", default="", metavar="ARGS", help="vLLM arguments of every model, in one string")
    add("--model-args", action="append", default=[], metavar="LABEL=ARGS", help="vLLM arguments of one model")
    add("--startup-seconds", type=float, default=900.0, help="how long a model may take to load (default: 900)")
    add("--commit", help="the commit measured, where the package is not in a git checkout")
    add("--resume", action="store_true", help="go on with the run that is in DIR")


def _settings(args: argparse.Namespace, targets: list[Target]) -> Settings:
    suites = list(SUITES) if "all" in args.suite else [suite for suite in SUITES if suite in args.suite]
    for name in ("repeats", "rounds", "requests", "seconds", "text_tokens"):
        if getattr(args, name) <= 0:
            raise OptionError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected more than 0")
    if args.window < 2:
        raise OptionError(f"--window {args.window}: expected at least 2 tokens")
    if any(rate <= 0 for rate in args.rates):
        raise OptionError("--rates: expected more than 0 requests per second")
    if "accuracy" in suites and not (args.text or args.task):
        if "all" not in args.suite:
            raise OptionError("--suite accuracy needs --text FILE or --task NAME")
        print("accuracy is left out: give --text FILE or --task NAME to measure it", file=sys.stderr)
        suites.remove("accuracy")
    if any(target.is_endpoint for target in targets) and {"latency", "throughput"} & set(suites):
        raise OptionError("a running server can be measured by --suite serve and accuracy alone")
    if args.resident and gpu_states() and "--kv-cache-memory" not in args.engine_args:
        raise OptionError(
            "--resident on a GPU needs --kv-cache-memory-bytes in --engine-args, so that the engines share its memory"
        )
    return Settings(
        suites=tuple(suites),
        latency_cases=tuple(select(args.use_case or [case.name for case in USE_CASES], args.scale)),
        batch_cases=tuple(select(args.batch_use_case or args.use_case or SERVED, args.scale)),
        repeats=args.repeats,
        rounds=args.rounds,
        resident=args.resident,
        requests=args.requests,
        rates=tuple(sorted(args.rates)),
        arrivals=tuple(arrival for arrival in args.arrivals if arrival in ARRIVALS),
        seconds=args.seconds,
        text=args.text,
        text_tokens=args.text_tokens,
        window=args.window,
        tasks=tuple(args.task),
        task_path=args.task_path,
        task_limit=args.task_limit,
        engine_args=args.engine_args,
        startup_seconds=args.startup_seconds,
    )


def _targets(args: argparse.Namespace) -> list[Target]:
    if bool(args.models) == bool(args.dummy):
        raise OptionError("give models, or --dummy CONFIG, and not both")
    if args.dummy:
        return dummy_targets(args.dummy, args.variants, args.out / "models")
    return parse_targets(args.models, args.model_args)


def run(args: argparse.Namespace) -> int:
    """Measure, report, and return the exit status: 1 if anything failed."""
    targets = _targets(args)
    settings = _settings(args, targets)
    check_positions(settings, targets)
    if "accuracy" in settings.suites:
        if settings.text is not None:
            read_text(settings)
        if settings.tasks:
            check_harness()
    header = environment(args.commit) | {
        "arguments": settings.to_json(),
        "targets": [target.to_json() for target in targets],
        "sla_itl_ms": args.sla_itl_ms,
        "scale": args.scale,
    }
    store = Store(args.out, header, args.resume)
    try:
        failures = Runner(settings, targets, store, args.out).run()
    finally:
        written = write_report(store.data, args.out)
    print(written.read_text(encoding="utf-8"))
    print(f"report: {written}", file=sys.stderr)
    return 1 if failures else 0
