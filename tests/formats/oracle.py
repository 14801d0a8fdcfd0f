"""Write the golden files with compressed-tensors 0.14.0.1, and check tensors of our own making with it.

That version is older than what vLLM wants, so it goes into a folder of its own, before everything else on the path:

    pip install --no-deps --target ORACLE -r requirements/oracle.txt
    PYTHONPATH=ORACLE:. python -m tests.formats.oracle tests/formats/golden    # writes the golden files
    PYTHONPATH=ORACLE:. python -m tests.formats.oracle FOLDER OURS             # and reads the files in OURS
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors.quantized_compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskTensor
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor
from compressed_tensors.compressors.sparse_quantized_compressors.marlin_24 import Marlin24Compressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from tests.formats.golden import CASES, Case, config, layer

VERSION = "0.14.0.1"
PREFIX = "model.layers.0.mlp.up_proj"


def dequantized(case: Case, made: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the float weight whose quantization gives the codes."""
    scales = made["scales"].float()
    columns = scales.shape[1] if scales.dim() == 2 else 1
    return (made["codes"].float().unflatten(1, (columns, -1)) * scales.reshape(-1, columns, 1)).flatten(1)


def store(case: Case, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer as compressed-tensors stores them, by the last part of their names."""
    scales = {"weight_scale": made["scales"]} if "scales" in made else {}
    if case.format == "sparse-24-bitmask":
        return Sparse24BitMaskTensor.from_dense(made["codes"]).dict("") | scales
    if case.format == "sparse-bitmask":
        return BitmaskTensor.from_dense(made["codes"]).dict("") | scales
    scheme = QuantizationScheme(**config(case)["config_groups"]["group_0"])
    weight, zeros = dequantized(case, made), made.get("zeros")
    if case.format == "marlin-24":
        state = {f"{PREFIX}.weight": weight.half(), f"{PREFIX}.weight_scale": made["scales"]}
        stored = Marlin24Compressor().compress(state, {PREFIX: scheme})
        return {name.removeprefix(f"{PREFIX}."): tensor for name, tensor in stored.items()}
    kind = PackedQuantizationCompressor if case.format == "pack-quantized" else NaiveQuantizationCompressor
    compressor = kind(None)
    return compressor.compress_weight(weight, made["scales"].float(), scheme.weights, zero_point=zeros) | scales


def write(folder: Path) -> None:
    """Write one file per case."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        stored = {name.lstrip("."): tensor.contiguous() for name, tensor in store(case, layer(case)).items()}
        metadata = {"oracle": f"compressed-tensors {VERSION}", "quantization_config": json.dumps(config(case))}
        save_file(stored, folder / f"{case.name}.safetensors", metadata=metadata)
        print(f"{case.name:32}", {name: list(tensor.shape) for name, tensor in stored.items()})


def read(folder: Path) -> None:
    """Decompress the bitmask files of ``folder``, compare the others with what the oracle writes; print a line each."""
    for case in CASES:
        made, given = layer(case), load_file(folder / f"{case.name}.safetensors")
        if "bitmask" in case.format:
            kind = Sparse24BitMaskTensor if case.format == "sparse-24-bitmask" else BitmaskTensor
            parts = {name: given[name] for name in ("shape", "compressed", "bitmask")}
            if kind is BitmaskTensor:
                parts["shape"] = parts["shape"].flatten().tolist()
                dense = kind(row_offsets=given["row_offsets"], **parts).decompress()
            else:
                dense = kind.from_compressed_data(**parts).decompress()
            same = torch.equal(dense.float(), made["codes"].float())
        else:
            wanted = {name.lstrip("."): tensor for name, tensor in store(case, made).items()}
            same = all(torch.equal(given[name], tensor) for name, tensor in wanted.items())
        print(f"{case.name:32}", "same" if same else "DIFFERENT")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if compressed_tensors.__version__ != VERSION:
        sys.exit(f"compressed-tensors is {compressed_tensors.__version__}, the oracle is {VERSION}")
    torch.set_num_threads(1)
    write(Path(sys.argv[1]))
    for ours in sys.argv[2:]:
        read(Path(ours))
