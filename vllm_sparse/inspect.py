"""``vllm-sparse inspect``: what is in a checkpoint, layer by layer, and which kernel would run it here."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sparse.errors import NotSparseError
from vllm_sparse.formats import Format, detect
from vllm_sparse.formats.checkpoint import Checkpoint
from vllm_sparse.formats.convert import layers_of
from vllm_sparse.formats.embedding import check_table
from vllm_sparse.kernels import reasons_against
from vllm_sparse.plugin.layer import layer_spec
from vllm_sparse.weight import LinearSpec, nonzero_mask

_HEADINGS = ("layer", "n x k", "scheme", "group", "sparsity", "MB", "kernel")


@dataclass(frozen=True)
class Layer:
    """One linear layer of a checkpoint.

    Attributes:
        spec: what its kernel decides by; None for a layer that is served dense.
        sparsity: "2:4", or what the weights of a dense layer are instead.
        nbytes: of all its tensors on disk.
    """

    name: str
    n: int
    k: int
    spec: LinearSpec | None
    sparsity: str
    nbytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vllm-sparse inspect``."""
    parser.add_argument("checkpoint", help="model directory")


def run(args: argparse.Namespace) -> int:
    """Print the table; raise FormatError on a checkpoint that cannot be read."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Checkpoint(args.checkpoint) as checkpoint:
        fmt = detect(quantization_config(checkpoint.config))
        layers = list(read_layers(checkpoint, fmt))
        tables = embedding_lines(checkpoint, fmt)
    print("\n".join([*table(layers, device), "", *summary(layers, fmt, device), *tables]))
    return 0


def quantization_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's ``quantization_config`` from where vLLM looks for it; empty if there is none."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := place.get(key), dict):
                return found
    return {}


def read_layers(checkpoint: Checkpoint, fmt: Format | None) -> Iterator[Layer]:
    """Yield the linear layers. Only of a format that does not promise 2:4 are weights read, one layer at a time.

    Raises:
        FormatError: a layer's tensors are not what its format says.
    """
    dtype = checkpoint.dtype
    for module, tensors in sorted(layers_of(checkpoint, fmt).items()):
        infos = {suffix: checkpoint.tensors[name] for suffix, name in tensors.items()}
        if "embed" in module or module in _embeddings(fmt) or ("weight" in infos and len(infos["weight"].shape) != 2):
            continue
        nbytes = sum(info.nbytes for info in infos.values())
        size = None
        if fmt is not None and fmt.scheme_of(module) is not None:
            size = fmt.features(module, {suffix: info.shape for suffix, info in infos.items()})
        if fmt is not None and size is not None and size[1] % 4 == 0:
            given = {suffix: (info.shape, info.dtype) for suffix, info in infos.items()}
            file = checkpoint.path / next(iter(infos.values())).file
            fmt.check(module, given, f"{file}: {module}")
            spec: LinearSpec | None = layer_spec(fmt, module, *size, dtype)
            sparsity = "2:4"
            if not fmt.promises_sparse:
                spec, sparsity = _detected(checkpoint, fmt, module, tensors, spec)
            yield Layer(module, *size, spec, sparsity, nbytes)
        elif "weight" in infos:
            n, k = infos["weight"].shape
            yield Layer(module, n, k, None, "dense", nbytes)


def table(layers: list[Layer], device: torch.device) -> list[str]:
    """Return the lines of the table of ``layers``."""
    rows = [_HEADINGS]
    for layer in layers:
        spec = layer.spec
        group = "" if spec is None or spec.scale_dtype is None else str(spec.group_size).replace("-1", "channel")
        kernel = "" if spec is None else _kernel(spec, device) or "none"
        scheme = "" if spec is None else spec.scheme.name
        size = f"{layer.n} x {layer.k}"
        rows.append((layer.name, size, scheme, group, layer.sparsity, f"{layer.nbytes / 1e6:.2f}", kernel))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def summary(layers: list[Layer], fmt: Format | None, device: torch.device) -> list[str]:
    """Return the totals, and for each kernel that cannot run some layers the sentences that say why."""
    sparse = [layer for layer in layers if layer.spec is not None]
    nbytes, dense = sum(layer.nbytes for layer in sparse), sum(2 * layer.n * layer.k for layer in sparse)
    name = "no 2:4 format" if fmt is None else f"format {fmt.name}"
    lines = [f"{name}: {len(sparse)} of {len(layers)} linear layers are 2:4"]
    if sparse:
        lines[0] += f"; {nbytes / 1e6:.2f} MB, where dense bf16 takes {dense / 1e6:.2f} MB"
    against: Counter[tuple[str, str]] = Counter()
    for layer in sparse:
        assert layer.spec is not None
        against.update((k, why) for k, why in reasons_against(layer.spec, device).items() if why is not None)
    lines += [
        f"kernel {kernel} does not run {count} of them on {device.type}: {why}"
        for (kernel, why), count in against.items()
    ]
    return lines


def embedding_lines(checkpoint: Checkpoint, fmt: Format | None) -> list[str]:
    """Return one line for each embedding table that is stored in 8 bits; raise FormatError on one that is wrong."""
    lines, modules = [], layers_of(checkpoint, fmt)
    for name in _embeddings(fmt):
        infos = {suffix: checkpoint.tensors[full] for suffix, full in modules.get(name, {}).items()}
        file = next((info.file for info in infos.values()), "config.json")
        check_table(f"{checkpoint.path / file}: {name}", {key: (info.shape, info.dtype) for key, info in infos.items()})
        n, k = infos["weight"].shape
        lines.append(
            f"embeddings {name}: {n} x {k} in int8, {sum(info.nbytes for info in infos.values()) / 1e6:.2f} MB"
        )
    return lines


def _embeddings(fmt: Format | None) -> tuple[str, ...]:
    return () if fmt is None else fmt.embeddings


def _detected(
    checkpoint: Checkpoint, fmt: Format, module: str, tensors: Mapping[str, str], spec: LinearSpec | None
) -> tuple[LinearSpec | None, str]:
    """Read a layer's weights and return its spec, None if it is not 2:4, and what the weights are."""
    loaded = {suffix: checkpoint.load(name) for suffix, name in tensors.items()}
    try:
        fmt.to_weight(module, loaded, [])
    except NotSparseError as error:
        count = str(error).partition(": ")[2].partition(" groups")[0]
        zeros = ""
        if "weight" in loaded:
            zeros = f", {100 * float(1 - nonzero_mask(loaded['weight']).float().mean()):.0f} % zeros"
        return None, f"not 2:4 in {count} groups{zeros}"
    return spec, "2:4"


def _kernel(spec: LinearSpec, device: torch.device) -> str | None:
    return next((name for name, why in reasons_against(spec, device).items() if why is None), None)
