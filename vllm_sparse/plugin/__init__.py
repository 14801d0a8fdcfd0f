"""The only folder that imports vLLM. Nothing is imported from it before ``register_with_vllm`` is called."""

from __future__ import annotations

import logging

METHOD = "sparse24"


def register_with_vllm() -> None:
    """Register the quantization method ``sparse24``; see ``vllm_sparse.register``."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
    except ImportError:
        return
    try:
        from vllm_sparse.plugin.config import Sparse24Config

        register_quantization_config(METHOD)(Sparse24Config)
    except Exception as error:
        logging.getLogger("vllm.vllm_sparse").warning("vllm-sparse could not be registered: %s", error)
