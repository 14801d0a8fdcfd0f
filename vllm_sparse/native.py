"""The C++ of this package for CPUs, ``vllm_sparse._cpu``, and the instruction set it is used with."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

from torch import Tensor

from vllm_sparse.errors import OptionError

IMPORT_ERROR = ""
try:
    cpu: Any = importlib.import_module("vllm_sparse._cpu")
except ImportError as error:  # no compiler at installation: what is written in torch remains
    cpu = None
    IMPORT_ERROR = str(error)

ISA_VARIABLE = "VLLM_SPARSE_CPU_ISA"


@functools.cache
def tier() -> Any:
    """Return the instruction-set tier in use: the best this machine runs, or the one ``VLLM_SPARSE_CPU_ISA`` names.

    Raises:
        OptionError: the variable names a tier that does not exist or does not run here.
    """
    try:
        return cpu.find_tier(os.environ.get(ISA_VARIABLE, ""))
    except ValueError as error:
        raise OptionError(f"{ISA_VARIABLE}: {error}") from None


def pointer(tensor: Tensor | None) -> int:
    """Return a tensor's address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
