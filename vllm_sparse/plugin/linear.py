"""The linear methods: create the checkpoint's tensors, turn them into the hub weight once, then run its kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    register_weight_loader_v2_supported_method,
)

from vllm_sparse.errors import FormatError, NotSparseError, UnsupportedError
from vllm_sparse.formats import Format, TensorSpec
from vllm_sparse.formats.dense import DenseFormat
from vllm_sparse.kernels import choose_kernel, reasons_against
from vllm_sparse.kernels.base import Kernel
from vllm_sparse.plugin.compat import (
    Quantizer,
    activation_quantizer,
    begin_online_loading,
    is_dummy_load,
    model_name,
)
from vllm_sparse.plugin.config import fused_names
from vllm_sparse.plugin.layer import layer_spec
from vllm_sparse.plugin.made_up import quantize_at_load, random_weight
from vllm_sparse.plugin.origin import Origin
from vllm_sparse.plugin.parameters import load_replicated, make_parameter, take_complete
from vllm_sparse.plugin.run import run_kernel
from vllm_sparse.scheme import SCHEMES, Scheme
from vllm_sparse.weight import LinearSpec, Sparse24Weight

if TYPE_CHECKING:
    from vllm_sparse.plugin.config import Sparse24Config

_DONE = "_already_called_process_weights_after_loading"  # vLLM deletes it when it reloads weights
# Where LoRA and MLA look for a layer's device; a kernel with other names has its largest tensor called so.
_MAIN_NAMES = ("weight", "weight_packed")
# Multi-head latent attention takes this layer's weight by multiplying the identity, which a static scale may not hold.
_ASKED_FOR_WEIGHTS = "kv_b_proj"


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(LinearMethodBase):
    """One linear layer that its checkpoint promises to be 2:4, in any ``Format``.

    Args:
        config: the model's.
        module: the layer's name in vLLM.
        stored_as: a name by which ``config.format`` knows the layer (the first part's of a fused one).
        scheme: the format's scheme for it.
    """

    def __init__(self, config: Sparse24Config, module: str, stored_as: str, scheme: Scheme) -> None:
        self.config = config
        self.module = module
        self.stored_as = stored_as
        self.scheme = scheme
        self.format: Format = config.format
        self.dummy = is_dummy_load()
        self.origin = Origin(model_name(), tuple(fused_names(module, config.packed_modules_mapping)))
        self.spec: LinearSpec | None = None
        self.kernel: Kernel | None = None
        self._attributes: dict[str, str] = {}  # name in the kernel -> name on the layer
        self._quantize: Quantizer | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the tensors the checkpoint holds for this layer, or this rank's shard of it."""
        self.parts, self.k, self.full_k = list(output_partition_sizes), input_size_per_partition, input_size
        self.full_n, self.dtype = output_size, params_dtype
        self.config.report.expect()
        self._check_shard()
        loader = extra_weight_attrs["weight_loader"]
        if getattr(type(layer), "weight_loader", None) is ReplicatedLinear.weight_loader:
            loader = load_replicated
        loader = self.origin.naming(loader)
        # Metadata is dropped by the config's mapper: it would tell nothing new, and it comes once per fused part, which
        # makes the loader believe that the layer is complete too early.
        self._specs = tuple(spec for spec in self._tensors() if not spec.metadata)
        for spec in self._specs:
            layer.register_parameter(spec.name, make_parameter(spec, self.module, self.parts, loader, self._device()))
        if self.scheme.activation is not None:
            static = any(spec.name == "input_scale" for spec in self._specs) and not self._per_token
            self._quantize = activation_quantizer(self.scheme.activation, static)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace what was loaded by what the kernel wants; called again when weights are reloaded."""
        if getattr(layer, _DONE, False):
            return
        with self.origin.named():
            self._process(layer)
        setattr(layer, _DONE, True)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias`` for ``x`` ``[..., k]``."""
        assert self.kernel is not None and self.spec is not None
        packed = {name: getattr(layer, attribute) for name, attribute in self._attributes.items()}
        tokens = x.reshape(-1, x.shape[-1]).to(self.spec.dtype).contiguous()
        out = run_kernel(self.kernel, self.spec, packed, tokens, bias, self._quantize)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    @property
    def _per_token(self) -> bool:
        """Whether activations are quantized per token even where the checkpoint has a static scale."""
        return self.module.rpartition(".")[2] == _ASKED_FOR_WEIGHTS

    def _device(self) -> str | None:
        """Return where the checkpoint's tensors are created, None for the model's device."""
        return None

    def _check_shard(self) -> None:
        """Raise UnsupportedError if this rank's share is not one the format can be cut into."""
        fmt = self.format
        for what, size, multiple in [("output", n, fmt.shard_n) for n in self.parts] + [("input", self.k, fmt.shard_k)]:
            if size % multiple and self._is_split():
                raise UnsupportedError(
                    f"{self.module}: tensor parallelism cuts a [{self.full_n}, {self.full_k}] layer so that a rank "
                    f"gets {size} {what} features of a part, which is not a multiple of {multiple} as the {fmt.name} "
                    f"format needs; use a smaller tensor parallel size"
                )

    def _is_split(self) -> bool:
        return self.k != self.full_k or sum(self.parts) != self.full_n

    def _tensors(self) -> tuple[TensorSpec, ...]:
        try:
            return self.format.tensors(self.stored_as, sum(self.parts), self.k, self._storage_dtype())
        except FormatError as error:
            if not self._is_split():
                raise
            raise UnsupportedError(
                f"{self.module}: tensor parallelism cuts a [{self.full_n}, {self.full_k}] layer so that a rank gets "
                f"[{sum(self.parts)}, {self.k}]: {error}; use a smaller tensor parallel size"
            ) from error

    def _storage_dtype(self) -> torch.dtype:
        """Return the dtype that unquantized values are kept in: the model's, or bf16 where that is float32."""
        return self.dtype if self.dtype in SCHEMES["bf16"].value_dtypes else torch.bfloat16

    def _process(self, layer: torch.nn.Module) -> None:
        self._install(layer, self._weight(layer))

    def _weight(self, layer: torch.nn.Module) -> Sparse24Weight:
        """Make the hub weight of what was loaded, or a random one for a dummy load."""
        if self.dummy:
            device = layer.get_parameter(self._specs[0].name).device
            dtype = self._storage_dtype()
            return random_weight(layer_spec(self.format, self.stored_as, sum(self.parts), self.k, dtype), device)
        loaded = self._loaded(layer)
        try:
            return self.format.to_weight(self.stored_as, loaded, self.parts, self.full_k)
        except FormatError as error:  # any of the parts may be wrong, not the first alone
            raise type(error)(f"{self.module}{str(error).removeprefix(self.stored_as)}") from error

    def _loaded(self, layer: torch.nn.Module) -> dict[str, Tensor]:
        """Return the loaded tensors by name; raise FormatError naming one that is missing."""
        loaded = {}
        for spec in self._specs:
            parameter: Any = layer.get_parameter(spec.name)
            complete = take_complete(parameter)
            if not complete and not spec.optional:
                raise FormatError(
                    f"{self.module}: tensor {spec.name} is not in the checkpoint, or only a part of it; "
                    f"a shard is missing, or the config does not describe the file"
                )
            if complete:
                loaded[spec.name] = parameter.data
        return loaded

    def _install(self, layer: torch.nn.Module, weight: Sparse24Weight) -> None:
        """Pack ``weight`` for the best kernel and register what it needs in place of what was loaded."""
        if self._per_token:
            weight = replace(weight, input_scale=None)
        gate = len(self.parts) == 2 and self.parts[0] == self.parts[1]
        spec = replace(weight.spec(self.dtype), gated=gate)
        kernel = choose_kernel(spec, weight.device, self.config.options.kernel_for(spec, weight.device))
        packed = kernel.prepare(spec, weight)
        if weight.input_scale is not None:
            packed.setdefault("input_scale", weight.input_scale)
        self._remove_loaded(layer)
        self._attributes = attribute_names(packed)
        for name, tensor in packed.items():
            layer.register_parameter(self._attributes[name], Parameter(tensor, requires_grad=False))
        self.spec, self.kernel = spec, kernel
        nbytes = sum(tensor.nbytes for tensor in packed.values())
        self.config.report.sparse(self.module, spec, kernel.name, reasons_against(spec, weight.device), nbytes)

    def _remove_loaded(self, layer: torch.nn.Module) -> None:
        for spec in self._specs:
            delattr(layer, spec.name)


@register_weight_loader_v2_supported_method
class Sparse24DetectedLinearMethod(Sparse24LinearMethod):
    """One linear layer of a checkpoint that does not say whether it is 2:4.

    Its tensors are created on the meta device and materialized by the loader when the last shard of them is there, so
    that the dense model is never in memory as a whole. What is 2:4 is packed at once; what is not goes to the method
    that vLLM itself has for it.
    """

    uses_meta_device = True

    def __init__(self, config: Sparse24Config, module: str, stored_as: str, scheme: Scheme) -> None:
        super().__init__(config, module, stored_as, config.load_scheme or scheme)
        self._stock: LinearMethodBase | None = None
        self._reason = ""

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **named: Any) -> None:
        """Register the checkpoint's tensors on the meta device, or vLLM's own where no layer like this can be 2:4."""
        try:
            super().create_weights(layer, *sizes, **named)
        except (FormatError, UnsupportedError) as error:
            if self.config.options.strict:
                raise
            self._reason = str(error)
            self._stock = self.config.stock_method(layer, self.module)
            self._stock.create_weights(layer, *sizes, **named)
        else:
            begin_online_loading(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias``, sparse or dense as the weight turned out to be."""
        if self._stock is not None:
            return self._stock.apply(layer, x, bias)
        return super().apply(layer, x, bias)

    def _device(self) -> str | None:
        return "meta"

    def _check_shard(self) -> None:
        """Any share will do: one that cannot be 2:4 is served dense."""

    def _tensors(self) -> tuple[TensorSpec, ...]:
        specs = super()._tensors()
        if isinstance(self.format, DenseFormat) and self.dtype != torch.float32:
            # vLLM rounds a float32 checkpoint to the dtype that the model runs in.
            return tuple(replace(spec, accepts=(*spec.accepts, torch.float32)) for spec in specs)
        return specs

    def _process(self, layer: torch.nn.Module) -> None:
        if self._stock is not None and self._reason:
            self._stock.process_weights_after_loading(layer)
            self.config.report.dense(self.module, self._reason)
            return
        try:
            weight = quantize_at_load(self._weight(layer), self.scheme, self.module)
        except (NotSparseError, UnsupportedError) as error:
            # A layer that ran 2:4 before its weights were reloaded has no place for dense ones.
            if self.config.options.strict or self.kernel is not None:
                raise
            self._keep_dense(layer, str(error))
            return
        if self._stock is None:
            self._install(layer, weight)
        else:
            self._keep_dense(layer, "it was not 2:4 when it was first loaded")

    def _keep_dense(self, layer: torch.nn.Module, reason: str) -> None:
        """Hand the loaded tensors over to vLLM's own method."""
        loaded = {spec.name: layer.get_parameter(spec.name) for spec in self._specs}
        loader = next(iter(loaded.values())).weight_loader  # type: ignore[attr-defined]
        self._remove_loaded(layer)
        self._stock = self.config.stock_method(layer, self.module)
        self._stock.create_weights(
            layer, self.k, self.parts, self.full_k, self.full_n, self.dtype, weight_loader=loader
        )
        for name, parameter in loaded.items():
            layer.get_parameter(name).data.copy_(parameter.data)
        self._stock.process_weights_after_loading(layer)
        self.config.report.dense(self.module, reason)


def attribute_names(packed: dict[str, Tensor]) -> dict[str, str]:
    """Return the name on the layer for each of a kernel's tensors, one of them a name that vLLM looks for."""
    names = {name: name for name in packed}
    if not names.keys() & set(_MAIN_NAMES):
        largest = max(packed, key=lambda name: packed[name].nbytes)
        names[largest] = _MAIN_NAMES[-1]
    return names
