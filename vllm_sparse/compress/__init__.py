"""The offline companion: a dense causal LM becomes a 2:4, quantized checkpoint."""

from vllm_sparse.compress.pipeline import compress
from vllm_sparse.compress.recipe import Recipe
from vllm_sparse.compress.report import Report

__all__ = ["Recipe", "Report", "compress"]
