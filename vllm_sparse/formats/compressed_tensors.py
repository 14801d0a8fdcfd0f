"""What the formats of the compressed-tensors family share: the config's groups, targets and ignore lists, and scales.

Facts from compressed-tensors 0.14.0.1, the last release with the sparse formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.base import SCALE_DTYPES, Format, TensorSpec, per_channel, static_input
from vllm_sparse.formats.names import is_ignored, names_in
from vllm_sparse.scheme import GROUP_SIZES, SCHEMES, Scheme
from vllm_sparse.weight import Sparse24Weight

METHOD = "compressed-tensors"
_WHERE = "quantization_config"


@dataclass(frozen=True)
class Group:
    """One entry of ``config_groups``: how some layers are quantized.

    Attributes:
        targets: module names, ``re:`` patterns, or ``Linear`` for every linear layer.
        scheme: None if it is none of ours, so that others have to read the layer.
        group_size: input features per weight scale, -1 for one per output feature or per tensor.
        per_tensor: whether there is one weight scale per (part of a) layer.
        static_input: whether activations have a scale fixed at calibration.
        symmetric: whether the weight's zero point is zero.
        symmetric_input: whether that of the activations is.
    """

    targets: tuple[str, ...]
    scheme: Scheme | None
    group_size: int = -1
    per_tensor: bool = False
    static_input: bool = False
    symmetric: bool = True
    symmetric_input: bool = True


@dataclass(frozen=True)
class CompressedTensorsFormat(Format):
    """A format whose ``quantization_config`` is of compressed-tensors.

    Attributes:
        stored_as: the values of the config's ``format`` that a subclass reads.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    stock: Mapping[str, Any] = field(default_factory=dict, compare=False)

    stored_as: ClassVar[tuple[str, ...]]

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        return is_compressed_tensors(config) and config.get("format") in cls.stored_as

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return cls.promises_sparse or sparsity(config).get("sparsity_structure") == "2:4"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensorsFormat:
        return cls(read_groups(config), names_in(config.get("ignore"), "ignore"), cleaned(config))

    def stock_config(self) -> dict[str, Any] | None:
        return dict(self.stock)

    def scheme_of(self, module: str) -> Scheme | None:
        group = self.group_of(module)
        return None if group is None else group.scheme

    def symmetric_input(self, module: str) -> bool:
        return self.our_group(module).symmetric_input

    def group_of(self, module: str) -> Group | None:
        """Return how ``module`` is quantized; a target that names it goes before one that names its class."""
        if is_ignored(module, self.ignore):
            return None
        for group in self.groups:
            if is_ignored(module, group.targets):
                return group
        return next((group for group in self.groups if "Linear" in group.targets), None)

    def our_group(self, module: str) -> Group:
        """Return how ``module`` is quantized; raise FormatError if it is not, or not in one of our schemes."""
        group = self.group_of(module)
        if group is None or group.scheme is None:
            raise FormatError(f"{module}: the config does not say that this layer is in format {self.name}")
        return group


def is_compressed_tensors(config: Mapping[str, Any]) -> bool:
    """Return whether ``config`` is of compressed-tensors; early ones have no ``quant_method``."""
    if config.get("quant_method") not in (None, "", METHOD, "sparseml"):
        return False
    return any(key in config for key in ("config_groups", "sparsity_config")) or config.get("quant_method") == METHOD


def sparsity(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ``sparsity_config``, empty if there is none."""
    found = config.get("sparsity_config")
    return found if isinstance(found, Mapping) else {}


def cleaned(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` without its ``sparsity_config``, which vLLM refuses since 0.24 even where it says "dense"."""
    return {key: value for key, value in config.items() if key != "sparsity_config"}


def read_groups(config: Mapping[str, Any]) -> tuple[Group, ...]:
    """Return the config's groups; raise FormatError if they are not what compressed-tensors writes."""
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise FormatError(f"{_WHERE}: config_groups must be an object")
    return tuple(_read_group(str(name), group, config.get("format")) for name, group in groups.items())


def _read_group(name: str, group: Any, stored_as: Any) -> Group:
    if not isinstance(group, Mapping):
        raise FormatError(f"{_WHERE}: {name} of config_groups must be an object")
    targets = names_in(group.get("targets"), f"targets of {name}")
    weights, inputs = group.get("weights"), group.get("input_activations")
    for what, arguments in (("weights", weights), ("input_activations", inputs)):
        if arguments is not None and not isinstance(arguments, Mapping):
            raise FormatError(f"{_WHERE}: {what} of {name} must be an object")
    if weights is None or group.get("output_activations") or group.get("format") not in (None, stored_as):
        return Group(targets, None)
    group_size = weights.get("group_size") if weights.get("strategy") == "group" else -1
    if group_size not in GROUP_SIZES or weights.get("actorder") not in (None, False, "weight", "static"):
        return Group(targets, None)
    symmetric = weights.get("symmetric", True) is True
    static = inputs is not None and inputs.get("dynamic", False) is False
    scheme = _scheme(weights, inputs, symmetric, static)
    if scheme is not None and group_size != -1 and not scheme.grouped:
        scheme = None
    symmetric_input = inputs is None or inputs.get("symmetric", True) is True
    per_tensor = weights.get("strategy") == "tensor"
    return Group(targets, scheme, int(group_size), per_tensor, static, symmetric, symmetric_input)


def _scheme(
    weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, symmetric: bool, static: bool
) -> Scheme | None:
    """Return the scheme of a group, None if we have none for it."""
    kind, other = _kind(weights), _kind(inputs or {})
    if weights.get("strategy") not in ("tensor", "channel", "group") or weights.get("dynamic", False) is not False:
        return None
    if inputs is None:
        # Codes less an arbitrary zero point need five bits, so asymmetric 4-bit weights are kept as 8-bit ones.
        names = {("int", 4): "w4a16" if symmetric else "w8a16", ("int", 8): "w8a16" if symmetric else None}
        return SCHEMES.get(names.get(kind) or "")
    per = ("tensor",) if static else ("token", "tensor")
    if not symmetric or kind != other or inputs.get("strategy") not in per:
        return None
    if inputs.get("symmetric", True) is not True and other != ("int", 8):
        return None
    return SCHEMES.get({("float", 8): "fp8", ("int", 8): "int8"}.get(kind, ""))


def _kind(arguments: Mapping[str, Any]) -> tuple[str, int]:
    """Return type and bits of quantized values, as they are hashable whatever the config says."""
    kind, bits = arguments.get("type", "int"), arguments.get("num_bits", 8)
    return (kind, bits) if isinstance(kind, str) and isinstance(bits, int) else ("", 0)


def scale_specs(group: Group, n: int, k: int, dtype: torch.dtype, of: str) -> list[TensorSpec]:
    """Return the scales of a layer: of the weight, and of the activations if those are static."""
    specs = []
    if group.scheme is not None and group.scheme.activation is not None:
        dtype = torch.float32
    if group.per_tensor:
        specs.append(TensorSpec("weight_scale", (1,), torch.float32, None, None, per_part=True, accepts=SCALE_DTYPES))
    elif group.group_size == -1:
        specs.append(TensorSpec("weight_scale", (n, 1), dtype, 0, None, accepts=SCALE_DTYPES))
    else:
        if k % group.group_size:
            raise FormatError(f"{of}: group size {group.group_size} does not divide the {k} input features")
        shape, size = (n, k // group.group_size), group.group_size
        specs.append(TensorSpec("weight_scale", shape, dtype, 0, 1, input_multiple=size, accepts=SCALE_DTYPES))
    if group.static_input:
        specs.append(TensorSpec("input_scale", (1,), torch.float32, None, None, per_part=True, accepts=SCALE_DTYPES))
    if group.static_input and not group.symmetric_input:
        specs.append(
            TensorSpec("input_zero_point", (1,), torch.int8, None, None, per_part=True, accepts=(torch.int32,))
        )
    return specs


def scales_of(group: Group, tensors: Mapping[str, Tensor], parts: Sequence[int]) -> Tensor | None:
    """Return the hub's weight scales, None where it has none, from the tensors of ``scale_specs``."""
    if group.scheme is None or not group.scheme.scaled:
        return None
    return per_channel(tensors["weight_scale"], parts) if group.per_tensor else tensors["weight_scale"]


def with_input(weight: Sparse24Weight, group: Group, tensors: Mapping[str, Tensor], module: str) -> Sparse24Weight:
    """Return ``weight`` with how its activations are quantized, from the tensors of ``scale_specs``."""
    static = static_input(tensors, group.symmetric_input) if group.static_input else {}
    return replace(
        weight,
        layer=module,
        input_scale=static.get("input_scale"),
        input_zero=static.get("input_zero"),
        symmetric_input=group.symmetric_input,
    )
