"""vLLM layers without an engine: one process plays every tensor-parallel rank in turn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

VllmContext = Callable[..., Any]


@pytest.fixture
def vllm_context(monkeypatch: pytest.MonkeyPatch) -> VllmContext:
    """Return ``context(rank=0, size=1, options=None, load_format="auto")``, in which layers can be built and loaded."""
    pytest.importorskip("vllm")
    from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    @contextmanager
    def context(rank: int = 0, size: int = 1, options: Any = None, load_format: str = "auto") -> Iterator[None]:
        for module in (parameter, linear):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        monkeypatch.setattr(linear, "tensor_model_parallel_all_reduce", lambda x: x)
        if options is None or isinstance(options, dict):
            options = {"kernel": "reference"} | (options or {})  # the same result whatever was built
        config = VllmConfig(load_config=LoadConfig(load_format=load_format), additional_config={"sparse24": options})
        with set_current_vllm_config(config):
            yield

    return context
