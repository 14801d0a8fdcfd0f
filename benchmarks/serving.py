"""The benchmark suite's presets, so that published numbers can be measured again with one command.

    python -m benchmarks.serving h200 OUT              # Llama-3.1-8B's shape, random weights: latency and throughput
    python -m benchmarks.serving cpu OUT DENSE 2OF4 …   # every suite, lengths a tenth, for machines without a GPU
    python -m benchmarks.serving cpu-1b OUT            # Llama-3.2-1B's shape, random weights: one stream on the CPU

Further arguments go to ``vllm-sparse bench``. OUT gets the results as one JSON file, the report, its plots, and the
end of every log; also when the run is interrupted (``timeout -s INT``), with what was measured until then.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from vllm_sparse.bench.store import FILE
from vllm_sparse.cli import main as command

HERE = Path(__file__).parent
PRESETS = {
    "h200": [
        *("--dummy", str(HERE / "llama-3.1-8b.json")),
        *("--variants", "bf16", "fp8", "w4a16", "sparse24-fp8", "sparse24-w4a16"),
        *("--suite", "latency", "throughput", "--batch-use-case", "instruction"),
        *("--resident", "--repeats", "3", "--startup-seconds", "300"),
        # 12 GiB of KV cache hold 98,304 tokens: just the 256 requests of 256 + 128 tokens.
        *("--engine-args", "--kv-cache-memory-bytes 13G --gpu-memory-utilization 0.1 --max-num-seqs 256"),
    ],
    "cpu": [
        *("--scale", "0.1", "--resident", "--repeats", "4", "--rounds", "1", "--requests", "16"),
        *("--batch-use-case", "instruction", "--seconds", "5", "--window", "256", "--text-tokens", "4096"),
        *("--engine-args", "--enforce-eager "),
    ],
    "cpu-1b": [
        *("--dummy", str(HERE / "llama-3.2-1b.json")),
        *("--variants", "bf16", "sparse24-bf16", "sparse24-w4a16"),
        *("--suite", "latency", "--use-case", "chat", "--repeats", "2", "--rounds", "1", "--startup-seconds", "600"),
        *("--engine-args", "--enforce-eager "),
    ],
}  # fmt: skip
LOG_LINES = 60


def problem(preset: str) -> str | None:
    """Return what is missing before a GPU is worth its time, or None."""
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="sparse24"):
        return "vLLM would not find the plugin: install the package, or run 'python setup.py egg_info' in its folder"
    if preset == "h200" and importlib.util.find_spec("vllm_sparse._cuda") is None:
        return "the CUDA kernels are not built: run 'python setup.py build_ext --inplace'"
    return None


def collect(work: Path, out: Path, preset: str) -> None:
    """Copy what is worth keeping of a run's directory into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    if (work / FILE).exists():
        results = (work / FILE).read_text(encoding="utf-8")
        (out / f"serving-{preset}.json").write_text(results.replace(f"{work}/", ""), encoding="utf-8")
    for file in [*work.glob("*.png"), *work.glob("report.md")]:
        shutil.copy(file, out / file.name)
    with (out / "logs.txt").open("w", encoding="utf-8") as text:
        for log in sorted(work.glob("logs/*.log")):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            text.write("\n".join([f"=== {log.name}", *lines, ""]))


def main() -> int:
    """Run one preset; return the command's exit status."""
    if len(sys.argv) < 3 or sys.argv[1] not in PRESETS:
        print(__doc__, file=sys.stderr)
        return 2
    preset, out, more = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if (missing := problem(preset)) is not None:
        print(f"error: {missing}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; several engines share a small machine
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory) / "run"
        try:
            return command(["bench", *PRESETS[preset], "-o", str(work), *more])
        finally:
            collect(work, out, preset)


if __name__ == "__main__":
    sys.exit(main())
