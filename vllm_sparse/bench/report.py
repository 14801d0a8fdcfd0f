"""The Markdown report of one run, in the shape of the published tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_sparse.bench import plots
from vllm_sparse.bench.serving import AT_ONCE, SINGLE
from vllm_sparse.bench.summary import Figure, Summary
from vllm_sparse.bench.use_cases import USE_CASES

FILE = "report.md"
_NONE = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns but the first are aligned to the right."""
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _cell(figure: Figure | None, ratio: float | None, digits: int = 3) -> str:
    if figure is None:
        return _NONE
    text = f"{figure.value:.{digits}g}"
    if figure.samples > 1:
        percent = 100 * figure.spread
        text += f" ±{percent:.0f}%" if percent >= 10 else f" ±{percent:.2g}%"
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def _title(case: tuple[str, int, int]) -> str:
    name, prompt, output = case
    title = next(known.title for known in USE_CASES if known.name == name)
    return f"{title} {prompt}+{output}"


def _by_case(
    summary: Summary, suite: str, figure: Callable[[str, str], Figure | None], lower_is_better: bool
) -> str | None:
    """Return a table of models by use cases, with the ratio to the baseline; None if nothing was measured."""
    cases = summary.cases(suite)
    if not cases:
        return None
    rows, found = [], False
    for model in summary.models:
        cells = []
        for name, _, _ in cases:
            value = figure(model, name)
            ratio = summary.ratio(value, figure(summary.baseline, name), lower_is_better)
            cells.append(_cell(value, None if model == summary.baseline else ratio, 4))
            found = found or ratio is not None
        mean = summary.mean_ratio(suite, model, figure, lower_is_better)
        rows.append([model, *cells, _NONE if mean is None else f"{mean:.2f}x"])
    return table(["model", *map(_title, cases), "mean"], rows) if found else None


def latency_table(summary: Summary) -> str | None:
    """Seconds of one request at a time."""
    return _by_case(summary, "latency", summary.latency, lower_is_better=True)


def first_token_table(summary: Summary) -> str | None:
    """Milliseconds to the first token of one request at a time."""
    return _by_case(summary, "latency", summary.first_token, lower_is_better=True)


def decode_table(summary: Summary) -> str | None:
    """Tokens per second of one request at a time, after its first token."""
    return _by_case(summary, "latency", summary.decode, lower_is_better=False)


def throughput_table(summary: Summary) -> str | None:
    """Requests per second of one batch."""
    return _by_case(summary, "throughput", summary.throughput, lower_is_better=False)


def served_tables(summary: Summary) -> list[tuple[str, str]]:
    """Return (heading, Markdown) of every use case that was served."""
    return [
        (f"Serving, {_title(case)}: milliseconds, median / p99", _served_table(summary, case[0]))
        for case in summary.cases("serve")
    ]


def _served_table(summary: Summary, case: str) -> str:
    limit = summary.data["sla_itl_ms"]
    arrivals = summary.data["arguments"]["arrivals"]
    rows = []
    for model in summary.models:
        cells = []
        for arrival, metrics in ((SINGLE, ("ttft", "itl", "tpot")), (AT_ONCE, ("ttft", "tpot"))):
            for metric in metrics:
                pair = [summary.served(model, case, arrival, metric, p) for p in ("p50", "p99")]
                cells.append(" / ".join(_NONE if figure is None else f"{figure.value:.3g}" for figure in pair))
        most = summary.saturation(model, case)
        ratio = None if model == summary.baseline else summary.ratio(most, summary.saturation(summary.baseline, case))
        best = [summary.best_rate(model, case, arrival, limit) for arrival in arrivals]
        rows.append([model, *cells, _cell(most, ratio), *(_NONE if rate is None else f"{rate:.3g}" for rate in best)])
    header = ["model", "one stream: TTFT", "ITL", "TPOT", "all at once: TTFT", "TPOT", "queries/s"]
    return table(header + [f"q/s, ITL ≤ {limit:g} ms, {arrival}" for arrival in arrivals], rows)


def accuracy_table(summary: Summary) -> str | None:
    """Every task of every model, and what is left of the baseline's in per cent."""
    found = summary.accuracy()
    if not found:
        return None
    rows = []
    for model in summary.models:
        cells = []
        for (_, metric), values in found.items():
            recovery = summary.recovery(metric, values, model)
            shown = f"{values[model]:.4g}" if model in values else _NONE
            cells.append(shown if recovery is None or model == summary.baseline else f"{shown} ({recovery:.1f} %)")
        rows.append([model, *cells])
    return table(["model", *(f"{task} {metric}" for task, metric in found)], rows)


def _megabytes(count: int | None) -> str:
    return _NONE if not count else f"{count / 1e6:,.1f}"


def memory_table(summary: Summary) -> str | None:
    """Megabytes on disk and in memory, and tokens of KV cache that the rest of the memory holds."""
    rows = []
    for model in summary.models:
        for row in summary.rows("memory", model=model)[:1]:
            tokens = f"{row['kv_tokens']:,}" if row.get("kv_tokens") else _NONE
            cells = [_megabytes(row["disk_bytes"]), _megabytes(row["weight_bytes"]), tokens]
            rows.append([model, *cells, f"{row['load_seconds']:.0f}"])
    return table(["model", "disk MB", "weights MB", "KV cache tokens", "seconds to load"], rows) if rows else None


def _describe(data: Mapping[str, Any]) -> list[str]:
    machine, arguments = data["machine"], data["arguments"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {gpus}",
        f"- {versions}; commit {data['commit'] or 'unknown'}",
        f"- {data['date']}; {arguments['repeats']} samples, {arguments['rounds']} round(s)"
        f"{', engines resident' if arguments['resident'] else ''}; medians ± half the range; prefix cache off",
        f"- engine arguments of every model: `{arguments['engine_args'] or 'none'}`",
    ]
    if data["scale"] != 1:
        lines.append(f"- **the use cases' lengths are scaled by {data['scale']:g}**, as the table heads say")
    for target in data["targets"]:
        said = [line for row in data["rows"] if row["model"] == target["label"] for line in row.get("plugin", [])]
        lines.append(f"- {target['label']}: {'; '.join([_name(target), *said])}")
    return lines


def _name(target: Mapping[str, Any]) -> str:
    """Return how a model was given: paths by their last part, since machines differ in the rest."""
    source = str(target["source"])
    name = source if source.startswith("http") else Path(source).name
    return f"`{' '.join([name, *target['options']])}`"


def sections(summary: Summary) -> list[tuple[str, str]]:
    """Return (heading, Markdown) of everything that was measured."""
    arguments = summary.data["arguments"]
    found = [
        ("Latency: seconds of one request", latency_table(summary)),
        ("Latency: milliseconds to the first token", first_token_table(summary)),
        ("Latency: tokens per second after it", decode_table(summary)),
        (f"Throughput: requests per second, {arguments['requests']} at once", throughput_table(summary)),
    ]
    found += served_tables(summary)
    found += [("Accuracy", accuracy_table(summary)), ("Memory", memory_table(summary))]
    return [(heading, text) for heading, text in found if text is not None]


def write_report(data: Mapping[str, Any], out: Path) -> Path:
    """Write ``report.md`` and its plots into ``out``; return the report's path."""
    summary = Summary(data)
    lines = [f"# {', '.join(summary.models)}", "", *_describe(data)]
    if data["warnings"]:
        lines += ["", "**Not a quiet machine; repeat before you rely on it:**", ""]
        lines += [f"- {sentence}" for sentence in data["warnings"]]
    if data["failures"]:
        lines += ["", "**Failed** (`--resume` tries again):", ""]
        lines += [f"- {failure['error']}" for failure in data["failures"]]
    for heading, text in sections(summary):
        lines += ["", f"## {heading}", "", text]
    pictures = plots.draw(summary, out)
    if pictures:
        lines += ["", "## Plots", ""] + [f"![{picture.stem}]({picture.name})" for picture in pictures]
    path = out / FILE
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
