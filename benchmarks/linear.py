"""Time linear layers, this package's kernels against their peers, in one process; one line per shape, one JSON file.

    python -m benchmarks.linear --schemes bf16 --out benchmarks/results/h200/linear-bf16.json
    python -m benchmarks.linear --schemes int8 fp8 --kernels vllm-sparse vllm-int8 vllm-fp8
    python -m benchmarks.linear --device cpu --help    # the same for the CPU's kernels (benchmarks/linear_cpu.py)

Weights are rotated so that no cache holds them between calls. On a GPU all calls of a measurement are one CUDA graph,
and a row is the median of its replays divided by the number of calls.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import linear_cpu
from benchmarks.shapes import MODELS, TOKENS
from vllm_sparse.kernels import choose_kernel
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import Sparse24Weight

FP8 = torch.float8_e4m3fn
ROTATED_BYTES = 300 << 20  # more than any last-level cache
CALLS = 24  # at least, per measurement
REPLAYS = 7

Call = Callable[[int], Any]  # multiplies by copy i of the weight
Build = Callable[[int, int, int], Callable[[int], Call]]  # (n, k, copies) -> (m) -> call


@dataclass(frozen=True)
class Row:
    """One kernel to time: a line of the table."""

    kernel: str
    scheme: str
    bits: float  # of weight read per original weight
    build: Build


def random_pairs(n: int, k: int, device: torch.device) -> Tensor:
    """Return random positions, packed as in ``Sparse24Weight``."""
    nibbles = torch.tensor([4, 8, 12, 9, 13, 14], dtype=torch.uint8, device=device)
    picks = nibbles[torch.randint(0, 6, (n, k // 4), device=device)]
    return picks[:, 0::2] | picks[:, 1::2] << 4


def random_codes(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), dtype=dtype, device="cuda")
    return torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda").to(dtype)


def sparse(dtype: torch.dtype, scheme: str, kernel_name: str) -> Build:
    """Return one of the package's own kernels for weights and activations of ``dtype``."""

    def build(n: int, k: int, copies: int) -> Callable[[int], Call]:
        device = torch.device("cuda")
        scales = torch.rand(n, 1, device=device) if get_scheme(scheme).scaled else None
        values = random_codes(n, k // 2, dtype)
        weight = Sparse24Weight(get_scheme(scheme), values, random_pairs(n, k, device), scales)
        spec = weight.spec(torch.bfloat16)
        kernel = choose_kernel(spec, device, kernel_name)
        packed = kernel.prepare(spec, weight)
        rotated = [packed, *({name: t.clone() for name, t in packed.items()} for _ in range(copies - 1))]

        def tokens(m: int) -> Call:
            x = random_codes(m, k, dtype)
            x_scale = None if scales is None else torch.rand(m, 1, device=device)
            return lambda i: kernel.apply(spec, rotated[i], x, x_scale, None)

        return tokens

    return build


def torch_bf16(n: int, k: int, copies: int) -> Callable[[int], Call]:
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]

    def tokens(m: int) -> Call:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        return lambda i: torch.mm(x, weights[i].t())

    return tokens


def torch_fp8(n: int, k: int, copies: int) -> Callable[[int], Call]:
    weights, scale = [random_codes(n, k, FP8) for _ in range(copies)], torch.rand(1, n, device="cuda")

    def tokens(m: int) -> Call:
        x, x_scale = random_codes(m, k, FP8), torch.rand(m, 1, device="cuda")
        return lambda i: torch._scaled_mm(x, weights[i].t(), x_scale, scale, out_dtype=torch.bfloat16)

    return tokens


def vllm_dense(dtype: torch.dtype) -> Build:
    """Return vLLM's dense W8A8 kernel, per-token and per-channel scales, for e4m3 or int8."""

    def build(n: int, k: int, copies: int) -> Callable[[int], Call]:
        if not hasattr(torch.ops._C, "cutlass_scaled_mm"):
            importlib.import_module("vllm._custom_ops")
        weights, scale = [random_codes(n, k, dtype) for _ in range(copies)], torch.rand(1, n, device="cuda")

        def tokens(m: int) -> Call:
            x, x_scale = random_codes(m, k, dtype), torch.rand(m, 1, device="cuda")
            out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
            return lambda i: torch.ops._C.cutlass_scaled_mm(out, x, weights[i].t(), x_scale, scale, None)

        return tokens

    return build


def sparse_w4a16(n: int, k: int, copies: int) -> Callable[[int], Call]:
    device = torch.device("cuda")
    values = torch.randint(-8, 8, (n, k // 2), device=device, dtype=torch.int8)
    scales = torch.rand(n, k // 128, device=device).bfloat16()
    weight = Sparse24Weight(get_scheme("w4a16"), values, random_pairs(n, k, device), scales, 128)
    spec = weight.spec(torch.bfloat16)
    kernel = choose_kernel(spec, device, "cuda_w4a16")
    packed = kernel.prepare(spec, weight)
    rotated = [packed, *({name: t.clone() for name, t in packed.items()} for _ in range(copies - 1))]

    def tokens(m: int) -> Call:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
        return lambda i: kernel.apply(spec, rotated[i], x, None, None)

    return tokens


def _dense_int4(n: int, k: int, copies: int) -> tuple[list[Tensor], Tensor, int]:
    """Return random packed codes, group scales and vLLM's number for the type uint4b8."""
    if not hasattr(torch.ops._C, "marlin_gemm"):
        importlib.import_module("vllm._custom_ops")
    kind = importlib.import_module("vllm.scalar_type").scalar_types.uint4b8.id
    shape = (n, k // 8)
    codes = [torch.randint(-(2**31), 2**31, shape, device="cuda").to(torch.int32) for _ in range(copies)]
    return codes, torch.rand(k // 128, n, device="cuda").bfloat16(), kind


def vllm_marlin(n: int, k: int, copies: int) -> Callable[[int], Call]:
    codes, scales, kind = _dense_int4(n, k, copies)
    weights = [c.view(k // 16, 2 * n) for c in codes]  # the values are random, so their order does not matter
    locks = torch.zeros(torch.cuda.get_device_properties(0).multi_processor_count, dtype=torch.int32, device="cuda")

    def tokens(m: int) -> Call:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        nones = (None,) * 5
        return lambda i: torch.ops._C.marlin_gemm(
            x, None, weights[i], None, scales, *nones, locks, kind, m, n, k, True, False, True, False
        )

    return tokens


def vllm_machete(n: int, k: int, copies: int) -> Callable[[int], Call]:
    codes, scales, kind = _dense_int4(n, k, copies)
    bf16 = torch.bfloat16
    weights = [torch.ops._C.machete_prepack_B(c.t(), bf16, kind, bf16) for c in codes]

    def tokens(m: int) -> Call:
        x = torch.randn(m, k, dtype=bf16, device="cuda")
        return lambda i: torch.ops._C.machete_mm(x, weights[i], kind, None, scales, None, 128, None, None, None)

    return tokens


def cusparselt(dtype: torch.dtype) -> Build:
    """The library's fastest algorithm for each m; it has no per-token scale, so for fp8 it does a little less work."""

    def build(n: int, k: int, copies: int) -> Callable[[int], Call]:
        dense = torch.randn(n, k, dtype=torch.bfloat16, device="cuda").unflatten(1, (-1, 4))
        dense[..., 2:] = 0
        weights = [torch._cslt_compress(dense.flatten(1).to(dtype)) for _ in range(copies)]

        def tokens(m: int) -> Call:
            x = random_codes(-(-m // 16) * 16, k, dtype)

            def call(i: int, algorithm: int) -> Tensor:
                out_dtype = None if dtype == torch.bfloat16 else torch.bfloat16  # the library takes 8-bit ones alone
                return torch._cslt_sparse_mm(weights[i], x.t(), out_dtype=out_dtype, alg_id=algorithm)

            def cost(algorithm: int) -> float:
                try:
                    return time_graph(lambda i: call(i, algorithm), copies, replays=2)
                except RuntimeError:
                    return float("inf")

            best = min(range(_cusparselt_algorithms()), key=cost)
            return lambda i: call(i, best)

        return tokens

    return build


def _cusparselt_algorithms() -> int:
    backend: Any = torch.backends.cusparselt
    return int(backend.get_max_alg_id() or 1) if hasattr(backend, "get_max_alg_id") else 1


# The one table: add a kernel here. vllm-sparse-mma is what every GPU since Ampere runs; it has no row for FP8, whose
# mma.sp Hopper takes apart into float16.
ROWS: tuple[Row, ...] = (
    Row("vllm-sparse", "fp8", 5, sparse(FP8, "fp8", "cuda_fp8")),
    Row("torch-fp8", "fp8", 8, torch_fp8),
    Row("vllm-fp8", "fp8", 8, vllm_dense(FP8)),
    Row("cusparselt", "fp8", 5, cusparselt(FP8)),
    Row("vllm-sparse", "int8", 5, sparse(torch.int8, "int8", "cuda_int8")),
    Row("vllm-sparse-mma", "int8", 5, sparse(torch.int8, "int8", "cuda_mma")),
    Row("vllm-int8", "int8", 8, vllm_dense(torch.int8)),
    Row("vllm-sparse", "bf16", 9, sparse(torch.bfloat16, "bf16", "cuda_bf16")),
    Row("vllm-sparse-mma", "bf16", 9, sparse(torch.bfloat16, "bf16", "cuda_mma")),
    Row("torch-bf16", "bf16", 16, torch_bf16),
    Row("cusparselt", "bf16", 9, cusparselt(torch.bfloat16)),
    Row("vllm-sparse", "w4a16", 3.125, sparse_w4a16),
    Row("vllm-marlin", "w4a16", 4.125, vllm_marlin),
    Row("vllm-machete", "w4a16", 4.125, vllm_machete),
)


def time_graph(call: Call, copies: int, replays: int = REPLAYS) -> float:
    """Return microseconds per call: median over replays of a graph that walks over all copies."""
    rounds = -(-CALLS // copies)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(rounds * copies):
            call(i % copies)
    times = []
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * copies))
    return statistics.median(times[2:])


def measure_read_tbps() -> float:
    """Return the bandwidth of one large reduction, in TB/s."""
    data = torch.zeros(1 << 30, dtype=torch.float32, device="cuda")
    return data.nbytes / time_graph(lambda i: data.sum(), 1, 3) / 1e6


def describe(row: Row, m: int, n: int, k: int, us: float, read_tbps: float) -> str:
    tbps = n * k * row.bits / 8 / us / 1e6
    line = f"{row.kernel:15} {row.scheme}  m={m:<5} n={n:<6} k={k:<6} {us:9.2f} us  {tbps:5.2f} TB/s"
    if read_tbps:
        line += f"  {100 * tbps / read_tbps:4.0f}% of read"
    return line + f"  {2 * m * n * k / us / 1e6:7.1f} TFLOP/s"


def measure(rows: Iterable[Row], models: list[str], tokens: list[int], read_tbps: float) -> list[dict[str, Any]]:
    """Time every row on every shape; a row that fails is reported and left out.

    All rows take their turn at one m before the next: timed right after 4096 tokens, a GPU at its power limit
    runs one token a quarter slower.
    """
    results = []
    for model in models:
        built = list(build_rows(rows, model))
        for m in tokens:
            for row, layer, copies, with_tokens in built:
                n, k = MODELS[model][layer]
                try:
                    us = time_graph(with_tokens(m), copies)
                except RuntimeError as error:
                    report_failure(model, layer, row, error)
                    continue
                line = {"kernel": row.kernel, "scheme": row.scheme, "model": model, "layer": layer}
                results.append(line | {"m": m, "n": n, "k": k, "us": round(us, 3)})
                print(f"{model:18} {layer:8}", describe(row, m, n, k, us, read_tbps), flush=True)
    return results


def build_rows(rows: Iterable[Row], model: str) -> Iterator[tuple[Row, str, int, Callable[[int], Call]]]:
    """Yield every row of every layer with its number of copies of the weight and its call for m tokens."""
    for layer, (n, k) in MODELS[model].items():
        for row in rows:
            copies = max(2, -(-ROTATED_BYTES // int(n * k * row.bits / 8)))
            try:
                yield row, layer, copies, row.build(n, k, copies)
            except (RuntimeError, ImportError, AttributeError) as error:
                report_failure(model, layer, row, error)
            torch.cuda.empty_cache()


def report_failure(model: str, layer: str, row: Row, error: Exception) -> None:
    print(f"{model} {layer} {row.kernel}: {str(error).splitlines()[0]}", file=sys.stderr)


def summarize(results: list[dict[str, Any]], model: str) -> None:
    """Print the sum over a model's layers per m, and each kernel's ratio to this package's of each scheme."""
    times: dict[tuple[str, str, int], list[float]] = {}
    for line in results:
        if line["model"] == model:
            times.setdefault((line["kernel"], line["scheme"], line["m"]), []).append(line["us"])
    sums = {key: sum(layers) for key, layers in times.items() if len(layers) == len(MODELS[model])}
    print(f"\n{model}: sum over its layers in us (times vllm-sparse)")
    for ours in dict.fromkeys(key for key in sums if key[0] == "vllm-sparse"):
        m = ours[2]
        peers = [(key, us) for key, us in sums.items() if key[2] == m and key[0] != "vllm-sparse"]
        cells = (f"{kernel}:{scheme} {us:.1f} ({us / sums[ours]:.2f}x)" for (kernel, scheme, _), us in peers)
        print(f"{ours[1]:5} m={m:<5} {sums[ours]:.1f}  ", "  ".join(cells))


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("vllm-sparse", "vllm"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if torch.backends.cusparselt.is_available():
        found["cusparselt"] = str(torch.backends.cusparselt.version())
    return found


def main() -> None:
    by_device = argparse.ArgumentParser(add_help=False)
    by_device.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device, rest = by_device.parse_known_args()
    if device.device == "cpu":
        linear_cpu.main(rest)
    else:
        time_gpu(rest)


def time_gpu(given: list[str]) -> None:
    """Time, print and write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["fp8", "bf16"], help="schemes of the rows to time")
    parser.add_argument("--kernels", nargs="+", help="kernels of the rows to time; the rest of --out is kept")
    parser.add_argument("--models", nargs="+", default=["Llama-3.1-8B"], choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--machine", default="", help="its name in the file")
    arguments = parser.parse_args(given)
    rows = [
        row
        for row in ROWS
        if row.scheme in arguments.schemes and (arguments.kernels is None or row.kernel in arguments.kernels)
    ]
    read_tbps = measure_read_tbps()
    results = measure(rows, arguments.models, arguments.tokens, read_tbps)
    for model in arguments.models:
        summarize(results, model)
    if arguments.out is not None:
        if arguments.out.exists():
            done = {(line["kernel"], line["scheme"]) for line in results}
            before = json.loads(arguments.out.read_text())["rows"]
            results = [line for line in before if (line["kernel"], line["scheme"]) not in done] + results
        name = arguments.machine or torch.cuda.get_device_name()
        report = {"machine": name, "date": datetime.date.today().isoformat(), "versions": versions()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps(report | {"read_tbps": round(read_tbps, 3), "rows": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
