"""What the plugin sets in vLLM, and when it leaves things alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tests.plugin.conftest import VllmContext

pytest.importorskip("vllm")

KEY = "triton.enable_pdl"


def compile_config() -> dict[str, Any]:
    from vllm.config import get_current_vllm_config

    found: dict[str, Any] = get_current_vllm_config().compilation_config.inductor_compile_config
    return found


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), True), ((10, 0), True), ((8, 9), None)])
def test_dependent_launch_is_on_where_the_gpu_can(
    vllm_context: VllmContext, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool | None
) -> None:
    from vllm_sparse.plugin.compat import enable_dependent_launch

    with vllm_context():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        enable_dependent_launch()
        assert compile_config().get(KEY) is expected


def test_dependent_launch_stays_as_the_user_set_it(vllm_context: VllmContext, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_sparse.plugin.compat import enable_dependent_launch

    with vllm_context():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        compile_config()[KEY] = False
        enable_dependent_launch()
        assert compile_config()[KEY] is False


def test_dependent_launch_is_untouched_without_a_gpu(
    vllm_context: VllmContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_sparse.plugin.compat import enable_dependent_launch

    with vllm_context():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        enable_dependent_launch()
        assert KEY not in compile_config()


def test_fp8_activations_go_through_our_op_where_there_is_one(
    vllm_context: VllmContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_sparse.kernels import cuda_quantize
    from vllm_sparse.plugin.compat import activation_quantizer

    x = torch.randn(2, 64).bfloat16()
    ours = (torch.zeros(2, 64), torch.zeros(2, 1))
    monkeypatch.setattr(cuda_quantize, "available", lambda: True)
    monkeypatch.setattr(cuda_quantize, "quantize", lambda given: ours)
    with vllm_context():
        assert activation_quantizer(torch.float8_e4m3fn, static=False)(x, None) is ours
        static = activation_quantizer(torch.float8_e4m3fn, static=True)(x, torch.tensor([0.5]))
    assert static[1].tolist() == [0.5]


def test_silu_and_quantization_become_one_op_where_there_is_one(
    vllm_context: VllmContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.compilation.passes.inductor_pass import InductorPass

    from vllm_sparse.kernels import cuda_quantize
    from vllm_sparse.plugin.compat import fuse_silu_and_quantization
    from vllm_sparse.plugin.fusion import FuseSiluQuantize

    key = "post_grad_custom_post_pass"
    with vllm_context():
        fuse_silu_and_quantization()
        assert key not in compile_config()  # a machine without the op
        monkeypatch.setattr(cuda_quantize, "available", lambda: True)
        fuse_silu_and_quantization()
        assert isinstance(compile_config()[key], InductorPass)
        assert compile_config()[key].uuid() == FuseSiluQuantize().uuid()
        compile_config()[key] = mine = object()
        fuse_silu_and_quantization()
        assert compile_config()[key] is mine


@pytest.mark.parametrize(("version", "warnings"), [("0.26.0", 0), ("0.32.0+cpu", 0), ("9.9.9", 1)])
def test_an_untested_version_is_named_once_and_tried(
    monkeypatch: pytest.MonkeyPatch, version: str, warnings: int
) -> None:
    from vllm_sparse.plugin import compat

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    compat.logger.addHandler(handler)
    try:
        compat.warn_if_untested()
        compat.warn_if_untested()
    finally:
        compat.logger.removeHandler(handler)
    told = [record.getMessage() for record in records]
    assert len(told) == warnings
    assert all(text.startswith(f"sparse24: vLLM {version} was not tested (tested: 0.26.0, ") for text in told)
