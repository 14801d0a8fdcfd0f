"""What a checkpoint's headers already tell about a linear layer."""

from __future__ import annotations

import torch

from vllm_sparse.errors import FormatError
from vllm_sparse.formats import Format
from vllm_sparse.weight import LinearSpec

_SCALE_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
)  # of weight scales; values of a scaled scheme have others


def layer_spec(fmt: Format, module: str, n: int, k: int, dtype: torch.dtype) -> LinearSpec:
    """Return the description a kernel decides by, from the tensors that ``fmt`` stores for a layer.

    Args:
        n, k: output and input features of the layer or shard.
        dtype: dtype of activations and output.

    Raises:
        FormatError: ``module`` is stored dense, or its sizes do not fit the format.
    """
    scheme = fmt.scheme_of(module)
    if scheme is None:
        raise FormatError(f"{module}: stored dense, so it has no 2:4 description")
    tensors = fmt.tensors(module, n, k, dtype)
    static = any(tensor.name == "input_scale" for tensor in tensors)
    symmetric = fmt.symmetric_input(module)
    scale = next((t for t in tensors if t.dtype in _SCALE_DTYPES and t.name != "input_scale"), None)
    if not scheme.scaled or scale is None:
        return LinearSpec(scheme, n, k, -1, dtype, None, static, symmetric)
    group_size = -1 if scale.input_dim is None else k * n // torch.Size(scale.shape).numel()
    return LinearSpec(scheme, n, k, group_size, dtype, scale.dtype, static, symmetric)
