"""One run of one tool for compress_speed.py, in a process and, for the rival, an environment of its own.

Usage: python compress_speed_run.py JOB.json, which holds tool, model, tokens (a file of int64 ids [samples, length]),
out (a directory to write) and recipe (a YAML file or options); for the rival batch_size and pipeline too. Prints a line
of JSON: seconds of wall and CPU time of the compression call, torch's threads and versions.

The rival's call is ``oneshot`` on a model in memory; reading it before and writing it after are left out. Ours is
``compress``, which reads, compresses, writes, reads back and verifies.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def rival(job: dict[str, Any], tokens: torch.Tensor) -> tuple[float, float]:
    """Run llm-compressor; return wall and CPU seconds of the call."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = tokens.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    wall, cpu = time.monotonic(), time.process_time()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=job["recipe"],
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        batch_size=job["batch_size"],
        pipeline=job["pipeline"],
    )
    taken = time.monotonic() - wall, time.process_time() - cpu
    model.save_pretrained(job["out"])
    tokenizer.save_pretrained(job["out"])
    return taken


def ours(job: dict[str, Any], tokens: torch.Tensor) -> tuple[float, float]:
    """Run vllm-sparse; return wall and CPU seconds of the call."""
    from vllm_sparse.compress import compress

    wall, cpu = time.monotonic(), time.process_time()
    compress(job["model"], job["out"], calibration=tokens, device="cpu", recipe=job["recipe"], force=True, quiet=True)
    return time.monotonic() - wall, time.process_time() - cpu


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    wall, cpu = {"rival": rival, "ours": ours}[job["tool"]](job, torch.load(job["tokens"]))
    tool = "llmcompressor" if job["tool"] == "rival" else "vllm-sparse"
    versions = {name: version(name) for name in (tool, "torch", "transformers")}
    told = {"wall": wall, "cpu": cpu, "threads": torch.get_num_threads(), "versions": versions}
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
