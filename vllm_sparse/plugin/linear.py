"""The linear methods: create the checkpoint's tensors, turn them into the hub weight once, then run its kernel."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from vllm_sparse.errors import FormatError, NotSparseError, UnsupportedError
from vllm_sparse.formats import Format, TensorSpec
from vllm_sparse.kernels import choose_kernel, reasons_against
from vllm_sparse.kernels.base import Kernel
from vllm_sparse.layer import layer_spec
from vllm_sparse.plugin.compat import Quantizer, activation_quantizer, begin_online_loading, is_dummy_load
from vllm_sparse.plugin.made_up import prune_to_two_of_four, quantize_at_load, random_weight
from vllm_sparse.plugin.parameters import load_replicated, make_parameter
from vllm_sparse.scheme import SCHEMES, Scheme, get_scheme
from vllm_sparse.weight import LinearSpec, Sparse24Weight

if TYPE_CHECKING:
    from vllm_sparse.plugin.config import Sparse24Config

_DONE = "_already_called_process_weights_after_loading"  # vLLM deletes it when it reloads weights


class _Sparse24Base(LinearMethodBase):
    """One linear layer: an instance belongs to a single layer, though it never holds a reference to it.

    Args:
        config: the model's.
        module: the layer's name in messages.
        scheme: what the layer will run in, so that its activations can be quantized.
    """

    def __init__(self, config: Sparse24Config, module: str, scheme: Scheme) -> None:
        self.config = config
        self.module = module
        self.scheme = scheme
        self.dummy = is_dummy_load()
        self.parts: list[int] = []
        self.k = 0
        self.dtype = torch.get_default_dtype()
        self.kernel: Kernel | None = None
        self.spec: LinearSpec | None = None
        self._loaded_names: tuple[str, ...] = ()
        self._packed_names: tuple[str, ...] = ()
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
        self.parts, self.k, self.dtype = list(output_partition_sizes), input_size_per_partition, params_dtype
        self.config.report.expect()
        loader = extra_weight_attrs["weight_loader"]
        if getattr(type(layer), "weight_loader", None) is ReplicatedLinear.weight_loader:
            loader = load_replicated
        specs = self._tensors(input_size)
        for spec in specs:
            parameter = make_parameter(spec, self.module, self.parts, loader, self._load_device())
            layer.register_parameter(spec.name, parameter)
        self._loaded_names = tuple(spec.name for spec in specs)
        if self.scheme.activation is not None:
            self._quantize = activation_quantizer(self.scheme.activation, static="input_scale" in self._loaded_names)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace what was loaded by what the kernel wants; called again when weights are reloaded."""
        if getattr(layer, _DONE, False):
            return
        self._process(layer)
        setattr(layer, _DONE, True)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias`` for ``x`` ``[..., k]``."""
        assert self.kernel is not None and self.spec is not None
        packed = {name: getattr(layer, name) for name in self._packed_names}
        tokens, scale = x.reshape(-1, x.shape[-1]).contiguous(), None
        if self._quantize is not None and not self.kernel.quantizes_input:
            tokens, scale = self._quantize(tokens, packed.get("input_scale"))
        out = self.kernel.apply(self.spec, packed, tokens, scale, bias)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    @abstractmethod
    def _tensors(self, input_size: int) -> tuple[TensorSpec, ...]:
        """Return the tensors to load; ``input_size`` is that of the layer before it was sharded."""

    @abstractmethod
    def _process(self, layer: torch.nn.Module) -> None:
        """Install a kernel on ``layer``."""

    def _load_device(self) -> str | None:
        return None

    def _storage_dtype(self) -> torch.dtype:
        """Return the dtype unquantized values are kept in: the model's, or bf16 where that is float32."""
        return self.dtype if self.dtype in SCHEMES["bf16"].value_dtypes else torch.bfloat16

    def _loaded(self, layer: torch.nn.Module, specs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
        """Return the loaded tensors by name; raise FormatError naming one that is missing."""
        loaded = {}
        for spec in specs:
            parameter = getattr(layer, spec.name)
            if parameter.is_complete():
                loaded[spec.name] = parameter.data
            elif not spec.optional:
                raise FormatError(
                    f"{self.module}: tensor {spec.name} is not in the checkpoint, or only a part of it; "
                    f"a shard is missing, or the config does not describe the file"
                )
            parameter.loaded.clear()
        return loaded

    def _install(self, layer: torch.nn.Module, weight: Sparse24Weight) -> None:
        """Pack ``weight`` for the best kernel and register what it needs in place of what was loaded."""
        spec = weight.spec(self.dtype)
        kernel = choose_kernel(spec, weight.device, self.config.options.kernel)
        packed = kernel.prepare(spec, weight)
        if weight.input_scale is not None:
            packed.setdefault("input_scale", weight.input_scale)
        for name in self._loaded_names:
            delattr(layer, name)
        for name, tensor in packed.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        self.spec, self.kernel, self._packed_names = spec, kernel, tuple(packed)
        nbytes = sum(tensor.nbytes for tensor in packed.values())
        self.config.report.sparse(self.module, spec, kernel.name, reasons_against(spec, weight.device), nbytes)


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(_Sparse24Base):
    """A layer that a checkpoint stores 2:4, in any ``Format``.

    Args:
        fmt: the checkpoint's format.
        checkpoint_module: a name by which ``fmt`` knows the layer (the first part of a fused one).
    """

    def __init__(
        self, config: Sparse24Config, module: str, fmt: Format, checkpoint_module: str, scheme: Scheme
    ) -> None:
        super().__init__(config, module, scheme)
        self.format = fmt
        self.checkpoint_module = checkpoint_module

    def _tensors(self, input_size: int) -> tuple[TensorSpec, ...]:
        split = f"tensor parallelism splits its {input_size} input features into {self.k} per rank"
        if self.k != input_size and self.k % self.format.shard_k:
            raise UnsupportedError(
                f"{self.module}: {split}, which is not a multiple of {self.format.shard_k} as the "
                f"{self.format.name} format needs; use a smaller tensor parallel size"
            )
        try:
            return self.format.tensors(self.checkpoint_module, sum(self.parts), self.k, self._storage_dtype())
        except FormatError as error:
            if self.k == input_size:
                raise
            raise UnsupportedError(f"{self.module}: {split}: {error}; use a smaller tensor parallel size") from error

    def _process(self, layer: torch.nn.Module) -> None:
        n, dtype = sum(self.parts), self._storage_dtype()
        specs = self.format.tensors(self.checkpoint_module, n, self.k, dtype)
        if self.dummy:
            device = getattr(layer, specs[0].name).device
            weight = random_weight(layer_spec(self.format, self.checkpoint_module, n, self.k, dtype), device)
        else:
            weight = self.format.to_weight(self.module, self._loaded(layer, specs), self.parts)
        self._install(layer, weight)


@register_weight_loader_v2_supported_method
class Sparse24OnlineLinearMethod(_Sparse24Base):
    """A layer of a dense checkpoint, compressed as soon as its last shard has arrived.

    Its weight is created on the meta device and materialized by the loader when complete, so that the dense model is
    never in memory as a whole. A layer that is not 2:4 keeps its dense weight and vLLM's own method.
    """

    uses_meta_device = True

    def __init__(self, config: Sparse24Config, module: str) -> None:
        super().__init__(config, module, get_scheme(config.options.scheme or "bf16"))
        self._dense_method = UnquantizedLinearMethod()
        self._is_dense: bool | None = None  # decided at the first load; a reload has to agree

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **named: Any) -> None:
        """Register the dense weight on the meta device."""
        super().create_weights(layer, *sizes, **named)
        begin_online_loading(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias``, sparse or dense as the weight turned out to be."""
        if self._is_dense:
            return self._dense_method.apply(layer, x, bias)
        return super().apply(layer, x, bias)

    def _tensors(self, input_size: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", (sum(self.parts), self.k), self.dtype, 0, 1),)

    def _load_device(self) -> str | None:
        return "meta"

    def _process(self, layer: torch.nn.Module) -> None:
        if self.dummy:
            dense = layer.get_parameter("weight").data
            dense = dense if self.k % 4 else prune_to_two_of_four(dense)
        else:
            dense = self._loaded(layer, self._tensors(self.k))["weight"]
        try:
            weight = self._compress(dense)
        except (NotSparseError, UnsupportedError) as error:
            if self.config.options.strict or self._is_dense is False:
                raise
            self._keep_dense(layer, str(error))
            return
        if self._is_dense:
            self._keep_dense(layer, "it was not 2:4 when it was first loaded")
            return
        self._is_dense = False
        self._install(layer, weight)

    def _compress(self, dense: Tensor) -> Sparse24Weight:
        if dense.shape[1] % 4:
            raise UnsupportedError(f"{self.module}: 2:4 needs a multiple of 4 input features, got {dense.shape[1]}")
        weight = Sparse24Weight.from_dense(_storable(dense, self.module), SCHEMES["bf16"], layer=self.module)
        weight.validate(self.module)
        return quantize_at_load(weight, self.scheme, self.module)

    def _keep_dense(self, layer: torch.nn.Module, reason: str) -> None:
        self._is_dense = True
        self._dense_method.process_weights_after_loading(layer)
        self.config.report.dense(self.module, reason)


def _storable(dense: Tensor, module: str) -> Tensor:
    """Return ``dense`` in a dtype that 2:4 values may have; float32 only if bf16 holds every value of it."""
    if dense.dtype in SCHEMES["bf16"].value_dtypes:
        return dense
    rounded = dense.to(torch.bfloat16)
    if not torch.equal(rounded.to(dense.dtype), dense):
        raise UnsupportedError(f"{module}: {dense.dtype} values do not fit bf16; load the model with --dtype bfloat16")
    return rounded
