"""The native format, specified in docs/formats.md: the hub's own tensors, int4 codes two per byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.formats.base import Format, TensorSpec, check_columns, matrix, static_input
from vllm_sparse.formats.names import is_ignored, names_in
from vllm_sparse.scheme import GROUP_SIZES, SCHEMES, Scheme
from vllm_sparse.weight import Sparse24Weight

VERSION = 1
_KEYS = frozenset(
    (
        "quant_method",
        "version",
        "scheme",
        "value_dtype",
        "group_size",
        "scale_dtype",
        "activation",
        "symmetric_activation",
        "ignore",
        "int8_embeddings",
        "producer",
    )
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_VALUE_DTYPES = ("bfloat16", "float16")
_ACTIVATIONS = ("dynamic", "static")


def _choice(config: Mapping[str, Any], key: str, default: Any, allowed: tuple[Any, ...], where: str) -> Any:
    """Return ``config[key]``, which has to be one of ``allowed`` and of its type (JSON has 1, 1.0 and true)."""
    value = config.get(key, default)
    for choice in allowed:
        if type(value) is type(choice) and value == choice:
            return choice
    raise FormatError(f"{where}: {key} {value!r} is not one of {', '.join(map(str, allowed))}")


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes -8 … 7 ``[n, c]``, c even, into uint8 ``[n, c / 2]``, even columns in the low nibble."""
    nibbles = codes.view(torch.uint8) & 15
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of ``pack_int4``: int8 ``[n, 2c]``."""
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(1)


@dataclass(frozen=True)
class Sparse24Format(Format):
    """``quant_method: sparse24``, format version 1."""

    scheme: Scheme
    value_dtype: str = "bfloat16"  # of scheme bf16 alone, which also holds float16
    group_size: int = -1
    scale_dtype: str = "float32"
    static_input: bool = False
    ignore: tuple[str, ...] = ()
    symmetric: bool = True  # activations
    embeddings: tuple[str, ...] = ()

    name = "sparse24"
    shard_k = 8

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == cls.name

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Sparse24Format:
        where = "quantization_config"
        if config.get("version") != VERSION:
            raise FormatError(f"{where}: format version {config.get('version')!r} is not {VERSION}; update vllm-sparse")
        if unknown := sorted(set(config) - _KEYS):
            raise FormatError(f"{where}: unknown key {unknown[0]!r} in a version {VERSION} sparse24 config")
        scheme = SCHEMES[_choice(config, "scheme", None, tuple(SCHEMES), where)]
        where = f"{where} of scheme {scheme.name}"
        symmetric = (True, False) if scheme is SCHEMES["int8"] else (True,)
        return cls(
            scheme,
            _choice(config, "value_dtype", "bfloat16", ("bfloat16",) if scheme.scaled else _VALUE_DTYPES, where),
            _choice(config, "group_size", -1, GROUP_SIZES if scheme.grouped else (-1,), where),
            _choice(config, "scale_dtype", "float32", tuple(_DTYPES), where),
            _choice(config, "activation", "dynamic", _ACTIVATIONS if scheme.activation else ("dynamic",), where)
            == "static",
            names_in(config.get("ignore"), "ignore"),
            _choice(config, "symmetric_activation", True, symmetric, where),
            names_in(config.get("int8_embeddings"), "int8_embeddings"),
        )

    def to_config(self) -> dict[str, Any]:
        """Return the ``quantization_config`` of a checkpoint in this format."""
        config: dict[str, Any] = {"quant_method": self.name, "version": VERSION, "scheme": self.scheme.name}
        if not self.scheme.scaled:
            config["value_dtype"] = self.value_dtype
        if self.scheme.grouped:
            config["group_size"] = self.group_size
        if self.scheme.scaled:
            config["scale_dtype"] = self.scale_dtype
        if self.scheme.activation is not None:
            config["activation"] = "static" if self.static_input else "dynamic"
        if not self.symmetric:
            config["symmetric_activation"] = False
        if self.embeddings:
            config["int8_embeddings"] = list(self.embeddings)
        return config | {"ignore": list(self.ignore)}

    def scheme_of(self, module: str) -> Scheme | None:
        return None if module in self.embeddings or is_ignored(module, self.ignore) else self.scheme

    def symmetric_input(self, module: str) -> bool:
        return self.symmetric

    def tensors(self, module: str, n: int, k: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        check_columns(module, k)
        scheme, scale_dtype = self.scheme, _DTYPES[self.scale_dtype]
        value_dtype = scheme.value_dtypes[0] if scheme.scaled else _DTYPES[self.value_dtype]
        values = TensorSpec("weight_packed", (n, k // 2), value_dtype, 0, 1, input_multiple=4)
        if scheme.weight_bits == 4:
            values = TensorSpec("weight_packed", (n, k // 4), torch.uint8, 0, 1, input_multiple=4)
        specs = [values, TensorSpec("weight_positions", (n, -(-k // 8)), torch.uint8, 0, 1, input_multiple=8)]
        if scheme.scaled and self.group_size == -1:
            specs.append(TensorSpec("weight_scale", (n, 1), scale_dtype, 0, None))
        elif scheme.scaled:
            if k % self.group_size:
                raise FormatError(f"{module}: group size {self.group_size} does not divide the {k} input features")
            shape = (n, k // self.group_size)
            specs.append(TensorSpec("weight_scale", shape, scale_dtype, 0, 1, input_multiple=self.group_size))
        if self.static_input:
            specs.append(TensorSpec("input_scale", (1,), torch.float32, None, None, per_part=True))
        if self.static_input and not self.symmetric:
            specs.append(TensorSpec("input_zero_point", (1,), torch.int8, None, None, per_part=True))
        return tuple(specs)

    def features(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        shape = matrix(module, "weight_packed", shapes)
        return shape and (shape[0], shape[1] * (4 if self.scheme.weight_bits == 4 else 2))

    def _to_weight(
        self, module: str, tensors: Mapping[str, Tensor], parts: Sequence[int], full_k: int
    ) -> Sparse24Weight:
        values = tensors["weight_packed"]
        return Sparse24Weight(
            self.scheme,
            unpack_int4(values) if self.scheme.weight_bits == 4 else values,
            tensors["weight_positions"],
            tensors["weight_scale"] if self.scheme.scaled else None,
            self.group_size,
            layer=module,
            symmetric_input=self.symmetric,
            **(static_input(tensors, self.symmetric) if self.static_input else {}),
        )

    def from_weight(self, weight: Sparse24Weight) -> dict[str, Tensor]:
        """Return the tensors to write for ``weight``, by ``TensorSpec.name``."""
        values = pack_int4(weight.values) if self.scheme.weight_bits == 4 else weight.values
        tensors = {"weight_packed": values, "weight_positions": weight.positions}
        if weight.scales is not None:
            tensors["weight_scale"] = weight.scales.to(_DTYPES[self.scale_dtype])
        if weight.input_scale is not None:
            tensors["input_scale"] = weight.input_scale.float()
        if weight.input_zero is not None:
            tensors["input_zero_point"] = weight.input_zero.to(torch.int8)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
