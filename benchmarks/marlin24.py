"""Write a native w4a16 checkpoint again as ``marlin-24``, with the last compressed-tensors that could.

    pip install --no-deps --target ORACLE -r requirements/oracle.txt    # .venv/oracle, after make venv
    PYTHONPATH=ORACLE:. python -m benchmarks.marlin24 NATIVE OUT
    vllm-sparse bench OUT --suite accuracy --text TEXT -o RESULTS       # on every machine that should agree

NATIVE is what ``vllm-sparse compress`` makes by default: groups of 128. OUT must not exist.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import compressed_tensors
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from vllm_sparse.formats.checkpoint import Checkpoint
from vllm_sparse.formats.convert import format_of, layers_of

VERSION = "0.14.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("native", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if compressed_tensors.__version__ != VERSION:
        parser.error(f"compressed-tensors is {compressed_tensors.__version__}, {VERSION} is the last with marlin-24")
    from compressed_tensors.compressors.sparse_quantized_compressors.marlin_24 import Marlin24Compressor

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    scheme, tensors = QuantizationScheme(**group), dict[str, Tensor]()
    with Checkpoint(args.native) as checkpoint:
        form, ignore = format_of(checkpoint), checkpoint.config["quantization_config"]["ignore"]
        for module, names in layers_of(checkpoint, form).items():
            loaded = {last: checkpoint.load(name) for last, name in names.items()}
            if "weight_packed" not in loaded:
                tensors |= {f"{module}.{last}": tensor for last, tensor in loaded.items()}
                continue
            weight = form.to_weight(module, loaded)
            assert weight.scales is not None  # scheme w4a16
            dense = {f"{module}.weight": weight.to_dense().half(), f"{module}.weight_scale": weight.scales.half()}
            tensors |= Marlin24Compressor().compress(dense, {module: scheme})
        config = checkpoint.config | {
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": "marlin-24", "quantization_status": "compressed",
                "config_groups": {"group_0": group}, "ignore": ignore,
            }
        }  # fmt: skip
        args.out.mkdir(parents=True)
        for file in checkpoint.other_files():
            if "token" in file.name:
                shutil.copy(file, args.out / file.name)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(tensors)} tensors, {sum(t.nbytes for t in contiguous.values()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
