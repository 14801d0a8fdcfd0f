"""The accuracy suite, through a served model: perplexity of a text, and lm-evaluation-harness tasks."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_sparse.bench.http import request
from vllm_sparse.bench.process import ending, last_error, start, stop
from vllm_sparse.bench.server import Server
from vllm_sparse.bench.settings import Settings
from vllm_sparse.errors import EngineError, OptionError

_STREAMS = 4
_CHARACTERS_PER_TOKEN = 16  # more than any tokenizer needs, so that only what is needed of a file is tokenized


def read_text(settings: Settings) -> str:
    """Return the text whose perplexity is asked for; raise OptionError if it cannot be read."""
    assert settings.text is not None
    try:
        text = settings.text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OptionError(f"--text {settings.text}: {error.strerror}") from error
    return text[: settings.text_tokens * _CHARACTERS_PER_TOKEN]


def windows(tokens: Sequence[int], length: int, limit: int) -> list[list[int]]:
    """Cut the first ``limit`` tokens into sequences of ``length``; a rest shorter than that is left out."""
    tokens = tokens[:limit]
    return [list(tokens[i : i + length]) for i in range(0, len(tokens) - length + 1, length)]


def _window_nll(server: Server, window: list[int]) -> float:
    body = {"model": server.model, "prompt": window, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = request(server.label, f"{server.url}/v1/completions", body)
    try:
        entries = answer["choices"][0]["prompt_logprobs"]
        pairs = zip(window[1:], entries[1:], strict=True)
        return -sum(float(entry[str(token)]["logprob"]) for token, entry in pairs)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise EngineError(f"{server.label}: {server.url} gives no log-probabilities of the prompt") from error


def perplexity(server: Server, settings: Settings) -> dict[str, Any]:
    """Return mean negative log-likelihood per token, perplexity and tokens of the text.

    The text is tokenized by the server; every token but the first of each window counts.

    Raises:
        EngineError: the server does not answer, or gives no prompt log-probabilities.
        OptionError: the text is shorter than one window.
    """
    body = {"model": server.model, "prompt": read_text(settings), "add_special_tokens": False}
    tokens = request(server.label, f"{server.url}/tokenize", body)["tokens"]
    parts = windows(tokens, settings.window, settings.text_tokens)
    if not parts:
        raise OptionError(f"--text {settings.text}: {len(tokens)} tokens are less than one window of {settings.window}")
    with ThreadPoolExecutor(_STREAMS) as pool:
        nlls = list(pool.map(lambda part: _window_nll(server, part), parts))
    nll = sum(nlls) / (len(parts) * (settings.window - 1))
    counted = {"tokens": len(parts) * settings.window, "window": settings.window}
    return {"nll": nll, "perplexity": math.exp(nll), "window_nll": nlls} | counted


def task_command(server: Server, settings: Settings, out: Path) -> list[str]:
    """Return the command that runs lm-evaluation-harness against the server."""
    model_args = {
        "model": server.model,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": server.tokenizer,
        "tokenized_requests": "True",
        "num_concurrent": str(_STREAMS),
    }
    listed = ",".join(f"{key}={value}" for key, value in model_args.items())
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", listed]
    command += ["--tasks", ",".join(settings.tasks), "--output_path", str(out), "--seed", "0"]
    if settings.task_path is not None:
        command += ["--include_path", str(settings.task_path)]
    return command + (["--limit", str(settings.task_limit)] if settings.task_limit is not None else [])


def read_tasks(out: Path) -> dict[str, dict[str, float]]:
    """Return ``{task: {metric: value}}`` of the newest results that lm-evaluation-harness wrote below ``out``."""
    files = sorted(out.rglob("results*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        return {}
    results = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    return {
        task: {name.split(",")[0]: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in results.items()
    }


def check_harness() -> None:
    """Raise OptionError unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise OptionError("--task needs lm-evaluation-harness: pip install 'vllm-sparse[eval]'")


def tasks(server: Server, settings: Settings, out: Path, log: Path) -> dict[str, dict[str, float]]:
    """Run the tasks against the server and return ``{task: {metric: value}}``.

    Raises:
        EngineError: the harness failed.
    """
    process = start(task_command(server, settings, out), log, {"OPENAI_API_KEY": "none"}, stdin=subprocess.DEVNULL)
    try:
        process.wait()
    finally:
        stop(process)
    found = read_tasks(out)
    if process.returncode or not found:
        server.check()
        raise EngineError(f"{server.label}: lm-evaluation-harness {ending(process)}: {last_error(log)}; see {log}")
    return found
