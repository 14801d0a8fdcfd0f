"""The only folder that imports vLLM. Nothing is imported from it before ``register_with_vllm`` is called."""

from __future__ import annotations


def register_with_vllm() -> None:
    """Register the quantization method ``sparse24``; see ``vllm_sparse.register``."""
