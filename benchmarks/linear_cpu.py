"""One linear layer on the CPU: the 2:4 kernels against torch and vLLM's dense ones, in one process.

    python -m benchmarks.linear --device cpu --models Llama-3.2-1B --tokens 1 16 512 --out out.json

Weights are copied until they exceed the last-level cache several times and the copies take turns, so every call reads
its weight from memory. Peers take turns too, window by window; a kernel's time is its best window, because on a
shared machine the others measure the neighbours. A read-only pass over memory on the same threads takes its turn like
a peer, so that a share of its bandwidth compares the same minutes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import MODELS as SHAPES
from vllm_sparse import native
from vllm_sparse.kernels import cpu
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import Sparse24Weight, pack_nibbles

MODELS = {
    "Llama-3.2-1B": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "Llama-3.1-8B": SHAPES["Llama-3.1-8B"],
}
GROUP_SIZE = 128
CACHE_BYTES = 128 << 20  # copies of a weight together exceed this
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A kernel: its name and scheme in the results, the bytes it reads per call, and one call per weight copy."""

    kernel: str
    scheme: str
    weight_bytes: int
    calls: list[Call]
    dtype: torch.dtype = torch.bfloat16


def copies(weight_bytes: int) -> int:
    return max(2, -(-CACHE_BYTES // weight_bytes))


def sparse_peer(scheme: str, n: int, k: int) -> Peer:
    kind = get_scheme("w4a16" if scheme == "w4a8" else scheme)
    pairs = torch.tensor([4, 8, 12, 9, 13, 14], dtype=torch.uint8)
    if kind.value_dtypes[0] == torch.int8:
        values = torch.randint(-7, 8, (n, k // 2), dtype=torch.int8)
    else:
        values = torch.randn(n, k // 2).to(kind.value_dtypes[0])
    group_size = GROUP_SIZE if kind.weight_bits == 4 else -1
    scales = torch.rand(n, k // group_size if group_size > 0 else 1).bfloat16() + 0.5 if kind.scaled else None
    positions = pack_nibbles(pairs[torch.randint(0, 6, (n, k // 4))])
    weight = Sparse24Weight(kind, values, positions, scales, group_size)
    kernel = cpu.CpuW4A8Kernel() if scheme == "w4a8" else cpu.CpuKernel()
    spec = weight.spec(torch.bfloat16)
    packed = kernel.prepare(spec, weight)
    weight_bytes = sum(t.numel() * t.element_size() for t in packed.values())

    def call(own: dict[str, Tensor]) -> Call:
        return lambda x: kernel.apply(spec, own, x, None, None)

    clones = [{name: t.clone() for name, t in packed.items()} for _ in range(copies(weight_bytes))]
    return Peer("vllm-sparse", scheme, weight_bytes, [call(own) for own in clones])


def torch_peer(dtype: torch.dtype, n: int, k: int) -> Peer:
    weight_bytes = n * k * dtype.itemsize
    weights = [torch.randn(n, k).to(dtype) for _ in range(copies(weight_bytes))]
    name = {torch.float32: "torch-fp32", torch.bfloat16: "torch-bf16"}[dtype]

    def call(weight: Tensor) -> Call:
        return lambda x: torch.nn.functional.linear(x, weight)

    return Peer(name, name.removeprefix("torch-"), weight_bytes, [call(weight) for weight in weights], dtype)


def vllm_bf16_peer(n: int, k: int) -> Peer:
    from vllm import _custom_ops as ops

    def call() -> Call:
        handler = ops.create_onednn_mm(torch.randn(n, k).bfloat16().t(), 32)
        return lambda x: ops.onednn_mm(handler, x, None)

    return Peer("vllm-cpu-bf16", "bf16", 2 * n * k, [call() for _ in range(copies(2 * n * k))])


def vllm_int8_peer(n: int, k: int) -> Peer:
    from vllm import _custom_ops as ops

    def call() -> Call:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8).t()
        scales = torch.rand(n, 1)
        adjustment = weight.sum(dim=0, keepdim=True, dtype=torch.float32) * scales.squeeze()
        handler = ops.create_onednn_scaled_mm(weight, scales, torch.bfloat16, True, False, 32)

        def linear(x: Tensor) -> Tensor:
            codes, scale, zero = ops.onednn_scaled_int8_quant(x, None, None, True)
            out = torch.empty((x.shape[0], n), dtype=x.dtype)
            return ops.onednn_scaled_mm(handler, codes, out, scale, zero, adjustment, None)

        return linear

    return Peer("vllm-cpu-int8", "int8", n * k, [call() for _ in range(copies(n * k))])


def vllm_w4a16_peer(n: int, k: int) -> Peer:
    from vllm import _custom_ops as ops

    weight_bytes = n * k // 2 + n * (k // GROUP_SIZE) * 2

    def call() -> Call:
        codes = torch.randint(-(2**31), 2**31, (n // 16, k * 2), dtype=torch.int64).to(torch.int32)
        scales = torch.rand(k // GROUP_SIZE, n).bfloat16()
        return lambda x: ops.cpu_gemm_wna16(x, codes, scales, None, None, 8, "vec")

    return Peer("vllm-cpu-w4a16", "w4a16", weight_bytes, [call() for _ in range(copies(weight_bytes))])


def read_peer() -> Peer:
    """A read-only pass over 512 MiB."""
    stream = torch.zeros(512 << 18, dtype=torch.int32)
    return Peer("read-only", "", stream.nbytes, [lambda x: stream.max()])


VLLM_PEERS = {"onednn_mm": vllm_bf16_peer, "onednn_scaled_mm": vllm_int8_peer, "cpu_gemm_wna16": vllm_w4a16_peer}


def vllm_ops() -> tuple[str, ...]:
    """Load vLLM's CPU kernels, if the package is there, and return the peers' that it has for this machine."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return ()
    current_platform.import_kernels()
    return tuple(name for name in VLLM_PEERS if hasattr(torch.ops._C, name))


def peers(n: int, k: int, schemes: list[str], dense: bool) -> Iterator[Peer]:
    for scheme in schemes:
        yield sparse_peer(scheme, n, k)
    if dense:
        yield torch_peer(torch.float32, n, k)
        yield torch_peer(torch.bfloat16, n, k)
        for op in vllm_ops():
            try:
                peer = VLLM_PEERS[op](n, k)
            except RuntimeError as error:  # bf16 without AVX-512, say
                print(f"{op}, {n} x {k}: {str(error).splitlines()[0]}")
            else:
                yield peer


def window(peer: Peer, x: Tensor, seconds: float) -> float:
    """Return seconds per call over one window of at least one call."""
    count, start = 0, time.perf_counter()
    while True:
        peer.calls[count % len(peer.calls)](x)
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / count


def measure(group: list[Peer], m: int, k: int, windows: int, seconds: float) -> list[float]:
    """Return each peer's best time for ``m`` tokens, in seconds."""
    inputs = {dtype: torch.randn(m, k).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    best = [float("inf")] * len(group)
    for turn in range(windows + 1):  # the first turn warms up
        for i, peer in enumerate(group):
            taken = window(peer, inputs[peer.dtype], seconds)
            if turn:
                best[i] = min(best[i], taken)
    return best


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, {native.tier().name}"


def describe(model: str, layer: str, peer: Peer, m: int, n: int, k: int, seconds: float, read: float) -> str:
    """Return a line: time, and bandwidth beside that of the read-only pass measured in turns with it."""
    name, rate = f"{peer.kernel:15}{peer.scheme:6}", peer.weight_bytes / seconds
    return (
        f"{model} {layer:8}{name} m={m:<4} n={n:<6} k={k:<6}{seconds * 1e6:10.1f} us {rate / 1e9:5.1f} GB/s "
        f"{rate / read:4.0%} of read {m * n * k / seconds / 1e9:4.0f} GMAC/s"
    )


def summarize(rows: list[dict[str, Any]], model: str) -> None:
    """Print, per number of tokens, the time of all measured layers of ``model`` and the speed-up over each peer."""
    times: Counter[tuple[int, str, str]] = Counter()
    for row in rows:
        if row["model"] == model:
            times[row["m"], row["kernel"], row["scheme"]] += row["us"]
    for (m, kernel, scheme), us in times.items():
        if kernel == "vllm-sparse":
            ratios = [
                f"{peer_us / us:.2f}x {peer}"
                for (peer_m, peer, _), peer_us in times.items()
                if peer != kernel and peer_m == m
            ]
            print(f"{model} all layers m={m:<4} {scheme:6}{us:10.1f} us  {'  '.join(ratios)}")


def main(arguments: list[str]) -> None:
    """Time, print and write what the command line asks for."""
    parser = argparse.ArgumentParser(prog="linear --device cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", nargs="+", default=["qkv", "o", "gate_up", "down"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
    parser.add_argument("--schemes", nargs="+", default=["w4a16", "w4a8", "int8", "bf16", "fp8"])
    parser.add_argument("--no-peers", action="store_true", help="time the 2:4 kernels alone")
    parser.add_argument("--windows", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.05, help="length of a window")
    parser.add_argument("--out", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    print(machine())
    rows: list[dict[str, Any]] = []
    reads: list[float] = []
    for model in options.models:
        for layer in options.layers:
            n, k = MODELS[model][layer]
            group = [read_peer(), *peers(n, k, options.schemes, not options.no_peers)]
            for m in options.tokens:
                seconds = measure(group, m, k, options.windows, options.seconds)
                reads.append(group[0].weight_bytes / seconds[0])
                for peer, taken in zip(group[1:], seconds[1:], strict=True):
                    print(describe(model, layer, peer, m, n, k, taken, reads[-1]), flush=True)
                    row = {"kernel": peer.kernel, "scheme": peer.scheme, "model": model, "layer": layer}
                    size = {"m": m, "n": n, "k": k, "us": round(taken * 1e6, 2)}
                    rows.append(row | size | {"read_tbps": round(reads[-1] / 1e12, 4)})
        summarize(rows, model)
    if options.out:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        if not options.no_peers and vllm_ops():
            versions["vllm"] = importlib.import_module("vllm").__version__
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        read_tbps = round(statistics.median(reads) / 1e12, 4)
        result = {"machine": machine(), "date": now, "versions": versions, "read_tbps": read_tbps, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
