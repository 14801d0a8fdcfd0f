"""The one table of checkpoint formats. Reading and writing here needs neither vLLM nor compiled code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_sparse.formats.base import Format, TensorSpec
from vllm_sparse.formats.bitmask import BitmaskFormat
from vllm_sparse.formats.dense import DenseFormat
from vllm_sparse.formats.gptq_marlin24 import GptqMarlin24Format
from vllm_sparse.formats.marlin24 import Marlin24Format
from vllm_sparse.formats.mixed import MixedFormat
from vllm_sparse.formats.packed import PackedFormat
from vllm_sparse.formats.passthrough import PassThroughFormat
from vllm_sparse.formats.quantized import QuantizedFormat
from vllm_sparse.formats.sparse24 import Sparse24Format
from vllm_sparse.formats.sparse_bitmask import SparseBitmaskFormat

__all__ = ["FORMATS", "Format", "Sparse24Format", "TensorSpec", "claims", "detect", "kind_of"]

# In this order: a bitmask's config also says how its values are quantized, and pass-through is about that alone.
FORMATS: tuple[type[Format], ...] = (
    Sparse24Format,
    BitmaskFormat,
    SparseBitmaskFormat,
    Marlin24Format,
    GptqMarlin24Format,
    PassThroughFormat,
    QuantizedFormat,
    PackedFormat,
    MixedFormat,
    DenseFormat,
)


def kind_of(config: Mapping[str, Any]) -> type[Format] | None:
    """Return the kind of format that a ``quantization_config`` (empty: there is none) says it is."""
    return next((kind for kind in FORMATS if kind.matches(config)), None)


def detect(config: Mapping[str, Any]) -> Format | None:
    """Return the format that a ``quantization_config`` (empty: there is none) names, None if it is none of ours.

    Raises:
        FormatError: it is one of ours and wrong.
    """
    kind = kind_of(config)
    return None if kind is None else kind.from_config(config)


def claims(config: Mapping[str, Any]) -> bool:
    """Return whether the config itself says that this package has to read the checkpoint: no flag is needed."""
    kind = kind_of(config)
    return kind is not None and kind.claims(config)
