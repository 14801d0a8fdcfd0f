"""What the plugin sets in vLLM, and when it leaves things alone."""

from __future__ import annotations

import logging
from types import SimpleNamespace
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


def test_kernels_are_fused_where_there_are_ops_for_it(
    vllm_context: VllmContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.compilation.passes.inductor_pass import InductorPass

    from vllm_sparse.kernels import cuda_w4a16
    from vllm_sparse.plugin.compat import fuse_kernels
    from vllm_sparse.plugin.fusion import FusionPass

    key = "post_grad_custom_post_pass"
    with vllm_context():
        fuse_kernels()
        assert key not in compile_config()  # a machine without the ops
        monkeypatch.setattr(cuda_w4a16, "available", lambda: True)
        fuse_kernels()
        assert isinstance(compile_config()[key], InductorPass)
        assert compile_config()[key].uuid() == FusionPass().uuid()
        compile_config()[key] = mine = object()
        fuse_kernels()
        assert compile_config()[key] is mine


def test_a_norm_that_the_user_chose_stays() -> None:
    from vllm.ir.ops import fused_add_rms_norm

    from vllm_sparse.plugin.compat import compilers_add_norm

    with fused_add_rms_norm.set_priority(["native"]):
        assert compilers_add_norm() is fused_add_rms_norm.torch_op
    fused_add_rms_norm.impls["mine"] = SimpleNamespace(provider="mine", supported=True, supports_all_args=True)
    try:
        with fused_add_rms_norm.set_priority(["mine"]):
            assert compilers_add_norm() is None
    finally:
        del fused_add_rms_norm.impls["mine"]


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
