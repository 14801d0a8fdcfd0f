"""Bytes of a loaded model; a module of its own, so that vLLM's worker processes can import what they are sent."""

from __future__ import annotations

import torch


def model_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's weights as they lie in memory, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    total = sum(storages.values())
    for module in model.modules():
        # vLLM's CPU layers keep a repacked weight of the same size outside PyTorch, and empty the parameter.
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, torch.Tensor) and not weight.numel():
            n, k = getattr(module, "output_size_per_partition", 0), getattr(module, "input_size_per_partition", 0)
            total += int(n) * int(k) * weight.dtype.itemsize
    return total
