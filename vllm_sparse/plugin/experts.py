"""Mixtures of experts: every expert's projections are 2:4 linear layers, run one expert after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from vllm_sparse.errors import FormatError, NotSparseError, UnsupportedError
from vllm_sparse.formats import Format
from vllm_sparse.formats.dense import DenseFormat
from vllm_sparse.kernels import choose_kernel, reasons_against
from vllm_sparse.plugin.compat import begin_online_loading, cpu_routing, is_dummy_load, model_name
from vllm_sparse.plugin.expert_loading import PARTS, ExpertTensor
from vllm_sparse.plugin.expert_op import ACTIVATIONS, Experts, Projection, register
from vllm_sparse.plugin.layer import layer_spec
from vllm_sparse.plugin.made_up import quantize_at_load, random_weight
from vllm_sparse.plugin.origin import Origin
from vllm_sparse.scheme import SCHEMES, Scheme
from vllm_sparse.weight import Sparse24Weight

if TYPE_CHECKING:
    from vllm_sparse.plugin.config import Sparse24Config

_ROUTING = (
    "top_k",
    "use_grouped_topk",
    "renormalize",
    "topk_group",
    "num_expert_group",
    "custom_routing_function",
    "scoring_func",
    "routed_scaling_factor",
    "e_score_correction_bias",
)
_DONE = "_already_called_process_weights_after_loading"  # as in linear.py


@dataclass(frozen=True)
class _Shape:
    """One projection of the experts on this rank: ``parts`` output features each, of ``k`` of ``full_k`` input ones."""

    parts: tuple[int, ...]
    k: int
    full_k: int

    @property
    def n(self) -> int:
        return sum(self.parts)


class Sparse24MoEMethod(FusedMoEMethodBase):
    """The routed experts of one layer, promised to be 2:4 by their checkpoint or found to be.

    The projections are vLLM's ``w13`` (gate and up, one linear layer) and ``w2`` (down). On disk every expert has its
    own tensors; on the layer they are stacked, ``[experts, ...]``, before and after packing.

    Args:
        config: the model's.
        layer: vLLM's RoutedExperts, not built up yet.
        module: its name.
        scheme: of all its experts.
    """

    def __init__(self, config: Sparse24Config, layer: Any, module: str, scheme: Scheme) -> None:
        super().__init__(layer.moe_config)
        self.config = config
        self.module = module
        self.format: Format = config.format
        self.detect = not self.format.promises_sparse
        self.scheme = (config.load_scheme or scheme) if self.detect else scheme
        self.uses_meta_device = self.detect
        self.dummy = is_dummy_load()
        self.origin = Origin(model_name(), (module,))
        # Named as the checkpoint's config does: the first part of each projection.
        self.names = {"w13": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name}
        # Made now, as vLLM's config is not known while weights are loaded.
        self._stock: Any = config.stock_moe_method(layer, module) if isinstance(self.format, DenseFormat) else None
        self._experts: Experts | None = None
        self._name = ""  # of the above, in the op
        self._choose = cpu_routing()
        self._check_supported(layer)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the tensors that the checkpoint holds for this rank's experts, or its shard of each."""
        self.count, self.dtype = num_experts, params_dtype
        size, ranks = intermediate_size_per_partition, layer.moe_config.moe_parallel_config.tp_size
        self.shapes = {
            "w13": _Shape((size, size), hidden_size, hidden_size),
            "w2": _Shape((hidden_size,), size, size * ranks),
        }
        try:
            self._check_shards(ranks)
            tensors = {name: self._tensors(name, layer) for name in self.shapes}
        except (FormatError, UnsupportedError):
            if not self.detect or self.config.options.strict:
                raise
            self._leave_to_vllm(layer, num_experts, hidden_size, size, params_dtype, extra_weight_attrs)
            return
        self.tensors = tensors
        for tensor in (tensor for stacked in tensors.values() for tensor in stacked):
            parameter = tensor.parameter("meta" if self.detect else None)
            parameter.weight_loader = self.origin.naming(tensor.load)  # type: ignore[attr-defined]
            layer.register_parameter(tensor.attribute, parameter)
        self.config.report.expect(len(self.shapes))
        self._attributes = extra_weight_attrs
        if self.detect:
            begin_online_loading(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace what was loaded by what the kernels want; called again when weights are reloaded."""
        if getattr(layer, _DONE, False):
            return
        try:
            with self.origin.named():
                weights = {name: self._weights(layer, name) for name in self.shapes}
            self._install(layer, {name: self._pack(layer, name, made) for name, made in weights.items()})
        except (NotSparseError, UnsupportedError) as error:
            # Experts that ran 2:4 before their weights were reloaded have no place for dense ones.
            if not self.detect or self.config.options.strict or self._experts is not None:
                raise
            self._keep_dense(layer, str(error))
        setattr(layer, _DONE, True)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return None: vLLM's own expert kernels, which it would describe, are not used."""
        return

    def maybe_make_prepare_finalize(self, routing_tables: Any = None) -> None:
        """Return None: tokens come and go as they are (asked for by vLLM 0.26)."""
        return

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Return ``sum_j topk_weights[:, j] * expert[topk_ids[:, j]](x)`` for ``x`` ``[m, k]``."""
        assert self._experts is not None
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids]
        w13 = [getattr(layer, f"w13_{key}") for key in self._experts.w13.names]
        w2 = [getattr(layer, f"w2_{key}") for key in self._experts.w2.names]
        return torch.ops.vllm_sparse.experts(x, topk_weights, topk_ids, w13, w2, self._name)

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM gives the router's logits to ``apply_monolithic`` instead of its choice to ``apply``."""
        return self._choose is not None

    def apply_monolithic(self, layer: Any, x: Tensor, router_logits: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Choose experts by ``router_logits`` ``[m, experts]`` and ``apply`` them."""
        assert self._choose is not None
        settings = {name: getattr(layer, name) for name in _ROUTING}
        return self.apply(layer, x, *self._choose(hidden_states=x, router_logits=router_logits, **settings))

    def _check_supported(self, layer: Any) -> None:
        """Raise UnsupportedError if these experts do more than two projections and an activation in between."""
        activation = layer.activation.value
        odd = None
        if activation not in ACTIVATIONS:
            odd = f"the activation {activation}"
        elif getattr(layer, "swiglu_limit", None) is not None:
            odd = "clamped activations"
        elif layer.moe_config.has_bias:
            odd = "biases"
        elif getattr(layer.moe_config, "is_lora_enabled", False):
            odd = "LoRA adapters on the model, which vLLM's own experts alone allow,"
        if odd is not None and not self.detect:
            raise UnsupportedError(f"{self.module}: 2:4 experts with {odd} are not supported")
        self.odd = odd

    def _check_shards(self, ranks: int) -> None:
        if self.odd is not None:
            raise UnsupportedError(f"{self.module}: 2:4 experts with {self.odd} are not supported")
        size = self.shapes["w2"].k
        for what, multiple in (("output", self.format.shard_n), ("input", self.format.shard_k)):
            if ranks > 1 and size % multiple:
                raise UnsupportedError(
                    f"{self.module}: tensor parallelism cuts the {size * ranks} intermediate features of the experts "
                    f"so that a rank gets {size} {what} features, which is not a multiple of {multiple} as the "
                    f"{self.format.name} format needs; use a smaller tensor parallel size"
                )

    def _tensors(self, name: str, layer: Any) -> list[ExpertTensor]:
        shape = self.shapes[name]
        specs = self.format.tensors(self._stored_as(name, 0), shape.n, shape.k, self._storage_dtype())
        also = (torch.float32,) if isinstance(self.format, DenseFormat) and self.dtype != torch.float32 else ()
        tensors = [ExpertTensor(name, spec, self.module, shape.parts, also, layer) for spec in specs]
        return [tensor for tensor in tensors if not tensor.spec.metadata]  # see linear.py

    def _stored_as(self, name: str, expert: int) -> str:
        """Return the checkpoint's name of (the first part of) an expert's projection."""
        return f"{self.module}.{expert}.{self.names[name]}"

    def _storage_dtype(self) -> torch.dtype:
        return self.dtype if self.dtype in SCHEMES["bf16"].value_dtypes else torch.bfloat16

    def _weights(self, layer: Any, name: str) -> list[Sparse24Weight]:
        """Make the hub weight of every expert's projection ``name``, or random ones for a dummy load."""
        shape, tensors = self.shapes[name], self.tensors[name]
        if self.dummy:
            spec = layer_spec(self.format, self._stored_as(name, 0), shape.n, shape.k, self._storage_dtype())
            device = layer.get_parameter(tensors[0].attribute).device
            return [quantize_at_load(random_weight(spec, device), self.scheme, self.module)] * self.count
        loaded = {tensor.spec.name: tensor.take(layer) for tensor in tensors}
        weights = []
        for expert in range(self.count):
            own = {key: stacked[expert] for key, stacked in loaded.items() if stacked is not None}
            stored_as = self._stored_as(name, expert)
            weight = self.format.to_weight(stored_as, own, shape.parts, shape.full_k)
            weights.append(quantize_at_load(weight, self.scheme, stored_as))
        return weights

    def _pack(self, layer: Any, name: str, weights: Sequence[Sparse24Weight]) -> tuple[Projection, dict[str, Tensor]]:
        """Return how projection ``name`` runs, and the packed tensors of all experts, stacked."""
        spec = weights[0].spec(self.dtype)
        kernel = choose_kernel(spec, weights[0].device, self.config.options.kernel_for(spec, weights[0].device))
        stacked: dict[str, Tensor] = {}
        for expert, weight in enumerate(weights):
            packed = kernel.prepare(spec, weight)
            if weight.input_scale is not None:
                packed.setdefault("input_scale", weight.input_scale)
            for key, tensor in packed.items():
                stacked.setdefault(key, tensor.new_empty(len(weights), *tensor.shape))[expert] = tensor
        nbytes = sum(tensor.nbytes for tensor in stacked.values())
        reasons = reasons_against(spec, weights[0].device)
        self.config.report.sparse(f"{self.module}.{name}", spec, kernel.name, reasons, nbytes)
        return Projection(spec, kernel.name, tuple(stacked)), stacked

    def _install(self, layer: Any, packed: dict[str, tuple[Projection, dict[str, Tensor]]]) -> None:
        self._remove_loaded(layer)
        for name, (_, stacked) in packed.items():
            for key, tensor in stacked.items():
                layer.register_parameter(f"{name}_{key}", Parameter(tensor, requires_grad=False))
        on_input = bool(layer.apply_router_weight_on_input)
        self._experts = Experts(packed["w13"][0], packed["w2"][0], layer.activation.value, on_input)
        self._name = register(self._experts)
        device = next(iter(packed["w2"][1].values())).device
        if device.type == "cuda":
            # The kernels read weights before their predecessors in the stream have finished, see Kernel.prepare.
            torch.cuda.current_stream(device).synchronize()

    def _remove_loaded(self, layer: Any) -> None:
        for tensor in (tensor for stacked in self.tensors.values() for tensor in stacked):
            delattr(layer, tensor.attribute)

    def _keep_dense(self, layer: Any, reason: str) -> None:
        """Hand the loaded tensors over to vLLM's own method."""
        if not isinstance(self.format, DenseFormat):
            raise UnsupportedError(
                f"{reason}; experts in format {self.format.name} run 2:4 or, without --quantization sparse24, by vLLM"
            )
        loaded = {name: layer.get_parameter(f"{name}_weight").data for name in PARTS}
        self._remove_loaded(layer)
        sizes = self.count, self.shapes["w13"].k, self.shapes["w2"].k
        self._stock.create_weights(layer, *sizes, self.dtype, **self._attributes)
        for name, tensor in loaded.items():
            layer.get_parameter(f"{name}_weight").data.copy_(tensor)
        self._stock.process_weights_after_loading(layer)
        _process_once(self._stock)
        layer.quant_method = self._stock
        for name in PARTS:
            self.config.report.dense(f"{self.module}.{name}", reason)

    def _leave_to_vllm(
        self, layer: Any, count: int, hidden: int, size: int, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        """Let vLLM's own method serve experts of which no tensor can be 2:4 here."""
        method = self._stock or self.config.stock_moe_method(layer, self.module)
        layer.quant_method = method
        method.create_weights(layer, count, hidden, size, dtype, **attributes)
        self.config.report.ignored(self.module)


def _process_once(method: Any) -> None:
    """Keep vLLM's loader, which processes every layer at its end, from doing it again."""
    process = method.process_weights_after_loading

    def guarded(layer: Any) -> None:
        if not getattr(layer, _DONE, False):
            process(layer)
            setattr(layer, _DONE, True)

    method.process_weights_after_loading = guarded
