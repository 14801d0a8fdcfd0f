"""Model directories for the tests of the formats."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_checkpoint(path: Path, tensors: dict[str, torch.Tensor], quantization: dict | None = None, **config) -> Path:
    """Write a model directory of one shard; return it."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"} | config
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def write_shards(path: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict | None = None) -> Path:
    """Write a model directory of several shards and its index; return it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    for file, tensors in shards.items():
        save_file(tensors, path / file)
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    """Write a safetensors file with a header of our choice."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
