"""The one table of checkpoint formats. Reading and writing here needs neither vLLM nor compiled code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_sparse.formats.base import Format, TensorSpec
from vllm_sparse.formats.sparse24 import Sparse24Format

__all__ = ["FORMATS", "Format", "Sparse24Format", "TensorSpec", "detect"]

FORMATS: tuple[type[Format], ...] = (Sparse24Format,)


def detect(config: Mapping[str, Any]) -> Format | None:
    """Return the format that a ``quantization_config`` names, or None if it is none of ours."""
    for kind in FORMATS:
        if kind.matches(config):
            return kind.from_config(config)
    return None
