"""Compress a real model to 2:4 twice, serve it and its dense original with vLLM, and print one table.

Everything that is measured goes through the server and the ``openai`` client, as a user's requests do.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from huggingface_hub import snapshot_download
from openai import OpenAI
from server import serve
from tiny_llama import source_texts
from transformers import AutoTokenizer

from vllm_sparse.formats.checkpoint import Checkpoint

SCHEMES = ("w4a16", "fp8")
PROMPT = "def __init__(self, name"
WINDOW, WINDOWS = 512, 32  # tokens and number of the sequences that perplexity is measured on
DECODED = 128
HERE = Path(__file__).parent


@dataclass
class Row:
    """What the table says of one model."""

    name: str
    disk_mb: float
    memory_mb: float
    perplexity: float
    tokens_per_s: float
    completion: str


def run(*command: str) -> None:
    """Run a command in the foreground, with this interpreter's environment."""
    print(f"$ python -m {' '.join(command)}", flush=True)
    # Threads that spin while they wait for each other take the cores from each other when the machine is shared.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ) | {"PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, "-m", *command], check=True, env=environment)


def evaluation_windows(model: Path) -> list[list[int]]:
    """Return the held-out text as token windows, spread evenly over the standard library's held-out files."""
    tokens = AutoTokenizer.from_pretrained(model)("\n".join(source_texts(evaluation=True)))["input_ids"]
    step = max(1, (len(tokens) - WINDOW) // WINDOWS)
    return [tokens[i * step : i * step + WINDOW] for i in range(WINDOWS)]


def perplexity(client: OpenAI, windows: list[list[int]]) -> float:
    """Return exp of the mean negative log-probability of every token but the first of each window."""

    def negative_log_likelihood(window: list[int]) -> float:
        answer = client.completions.create(
            model="model", prompt=window, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        entries: list[dict[str, Any] | None] = answer.choices[0].prompt_logprobs  # type: ignore[attr-defined]
        pairs = zip(window[1:], entries[1:], strict=True)
        return -sum(entry[str(token)]["logprob"] for token, entry in pairs if entry is not None)

    with ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(negative_log_likelihood, windows))
    return math.exp(total / sum(len(window) - 1 for window in windows))


def decode_speed(client: OpenAI) -> float:
    """Return tokens per second of a single request after its first token; the median of three.

    From whole requests of many tokens and of one: a client on a busy core reads several streamed tokens at once.
    """

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        client.completions.create(
            model="model", prompt=PROMPT, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
        )
        return time.perf_counter() - start

    seconds(DECODED)  # warm up
    return median((DECODED - 1) / (seconds(DECODED) - seconds(1)) for _ in range(3))


def weight_megabytes(model: Path, log: str) -> float:
    """Return the weights' size in memory: what the plugin logs for its layers, plus every other tensor on disk."""
    tensors = Checkpoint(model).tensors
    ours = re.findall(r"sparse24: .*?([\d.]+) MB packed", log)
    suffixes = ("weight_packed", "weight_positions", "weight_scale", "input_scale")
    others = sum(info.nbytes for name, info in tensors.items() if not (ours and name.endswith(suffixes)))
    return others / 1e6 + sum(map(float, ours))


def measure(name: str, model: Path, out: Path, options: list[str]) -> Row:
    """Serve ``model`` and measure it."""
    print(f"serving {name} …", flush=True)
    log = out / f"serve-{name}.log"
    windows = evaluation_windows(model)
    with serve(model, log, ["--served-model-name", "model", "--max-model-len", "1024", *options]) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
        completion = client.completions.create(model="model", prompt=PROMPT, max_tokens=24, temperature=0)
        speed = decode_speed(client)
        ppl = perplexity(client, windows)
    disk = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6
    memory = weight_megabytes(model, log.read_text(errors="replace"))
    return Row(name, disk, memory, ppl, speed, completion.choices[0].text)


def print_table(rows: list[Row]) -> None:
    """Print the rows, sizes in megabytes and the ratio to the first row beside speed."""
    print(f"\nprompt: {PROMPT!r}\n")
    print(f"{'model':<12} {'disk MB':>8} {'weights MB':>11} {'perplexity':>11} {'decode tok/s':>13}  completion")
    for row in rows:
        print(
            f"{row.name:<12} {row.disk_mb:>8.2f} {row.memory_mb:>11.2f} {row.perplexity:>11.2f} "
            f"{row.tokens_per_s:>13.1f}  {row.completion!r}"
        )


def main() -> None:
    """Make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--model", help="a model directory or hub id instead of the tiny Llama trained here")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    dense = args.out / "tiny-llama"
    if args.model:
        dense = Path(args.model if Path(args.model).exists() else snapshot_download(args.model))
    elif not (dense / "model.safetensors").exists():
        run("tiny_llama", str(dense))
    calibration = args.out / "calibration.txt"
    calibration.write_text("\n".join(source_texts(evaluation=False))[: 1 << 20], encoding="utf-8")
    models = {"dense": dense}
    for scheme in SCHEMES:
        models[f"2:4 {scheme}"] = out = args.out / f"{dense.name}-2of4-{scheme}"
        if not out.exists():
            samples = ["--calibration", str(calibration), "--num-samples", "64", "--seq-len", "256"]
            run("vllm_sparse.cli", "compress", str(dense), "-o", str(out), "--scheme", scheme, *samples)
    options = [] if torch.cuda.is_available() else ["--enforce-eager"]
    print_table([measure(name, model, args.out, options) for name, model in models.items()])


if __name__ == "__main__":
    main()
