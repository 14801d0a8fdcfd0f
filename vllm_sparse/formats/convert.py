"""``vllm-sparse convert``: any format into the native one, or into a dense checkpoint that stock vLLM loads.

One layer is in memory at a time, besides the shard that is being filled. Values stay the same bit by bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError, NotSparseError, OutputError
from vllm_sparse.formats import detect
from vllm_sparse.formats.base import Format
from vllm_sparse.formats.bitmask import BitmaskFormat
from vllm_sparse.formats.checkpoint import Checkpoint, CheckpointWriter
from vllm_sparse.formats.dense import DenseFormat
from vllm_sparse.formats.embedding import check_scales, check_table, dequantize_rows
from vllm_sparse.formats.quantized import QuantizedFormat
from vllm_sparse.formats.sparse24 import Sparse24Format
from vllm_sparse.formats.sparse_bitmask import SparseBitmaskFormat
from vllm_sparse.formats.stock import dense_tensors, stock_config
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import LinearSpec, Sparse24Weight

_SHARD_BYTES = 1 << 30
_CONFIG_KEYS = ("quantization_config", "compression_config")
_NOT_COPIED = {"quantize_config.json"}  # says again, for GPTQ, what config.json no longer does
_BITMASK = ("compressed", "bitmask", "shape", "row_offsets")
_KV_CACHE = {"k_scale", "v_scale", "q_scale", "output_scale"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ``quantization_config`` of a config.json, wherever writers put it; empty if there is none."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in _CONFIG_KEYS:
            if isinstance(place.get(key), Mapping):
                return place[key]
    return {}


def format_of(checkpoint: Checkpoint) -> Format:
    """Return the format of ``checkpoint``; raise FormatError naming its config if it is none of ours, or wrong."""
    found, file = quantization_config(checkpoint.config), checkpoint.path / "config.json"
    try:
        form = detect(found)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from error
    if form is None:
        raise FormatError(
            f"{file}: quant_method {found.get('quant_method')!r}, format {found.get('format')!r} is none of the "
            f"formats that can be converted"
        )
    return form


def layers_of(checkpoint: Checkpoint, form: Format | None) -> dict[str, dict[str, str]]:
    """Return the names of a checkpoint's tensors by module and by last part, as ``form`` (if any) calls it."""
    endings = {} if form is None else form.renamed
    modules: dict[str, dict[str, str]] = {}
    for name in checkpoint.tensors:
        called = name
        for ending, other in endings.items():
            if other is not None and name.endswith(ending):
                called = name.removesuffix(ending) + other
                break
        module, _, last = called.rpartition(".")
        names = modules.setdefault(module, {})
        if last in names:
            raise FormatError(f"{checkpoint.path}: {names[last]!r} and {name!r} are two names of one tensor")
        names[last] = name
    return modules


def check_tables(checkpoint: Checkpoint, form: Format, modules: Container[str]) -> None:
    """Raise FormatError if an embedding table that the config lists is none of the checkpoint's ``modules``."""
    for table in form.embeddings:
        if table not in modules:
            raise FormatError(f"{checkpoint.path / 'config.json'}: int8_embeddings has {table!r}, which is not stored")


@dataclass
class Summary:
    """What a conversion did: counts of linear layers, names of what was left out, sizes in bytes."""

    sparse: int = 0
    dense: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0


class Converter:
    """One conversion of ``checkpoint``, stored as ``form``, into ``writer``."""

    def __init__(self, checkpoint: Checkpoint, form: Format, writer: CheckpointWriter, to_dense: bool) -> None:
        self.checkpoint, self.form, self.writer, self.to_dense = checkpoint, form, writer, to_dense
        self.summary = Summary(bytes_before=sum(info.nbytes for info in checkpoint.tensors.values()))
        self._stock = _stock_config(form) if to_dense else None
        self._kinds: dict[LinearSpec, list[str]] = {}
        self._scale_dtype = self._common_scale_dtype()

    def run(self) -> Summary:
        """Convert every tensor, then the config; return what was done."""
        modules = layers_of(self.checkpoint, self.form)
        check_tables(self.checkpoint, self.form, modules)
        for module, names in modules.items():
            given = {last: (info.shape, info.dtype) for last, info in self._infos(names).items()}
            try:
                if module in self.form.embeddings:
                    self._convert_table(module, names, given)
                elif self._is_ours(module, names):
                    self._convert(module, names, given)
                else:
                    self._copy(module, names)
            except FormatError as error:
                file = sorted({self.checkpoint.tensors[name].file for name in names.values()})[0]
                raise type(error)(f"{self.checkpoint.path / file}: {error}") from error
        self._write_config()
        return self.summary

    def _is_ours(self, module: str, names: Mapping[str, str]) -> bool:
        """Return whether the format says that a module is, or may be, a 2:4 layer."""
        form, shapes = self.form, {last: info.shape for last, info in self._infos(names).items()}
        if self._stock is not None and not isinstance(form, BitmaskFormat):
            return False  # dense as it is
        if isinstance(form, DenseFormat):
            # A router of a mixture of experts may be float32 in a bf16 model.
            dtypes = {self.checkpoint.tensors[name].dtype for last, name in names.items() if last == "weight"}
            if _outside_linear(module) or not dtypes <= set(SCHEMES["bf16"].value_dtypes):
                return False
        if form.scheme_of(module) is None:
            return False
        if form.features(module, shapes) is not None:
            return True
        if lost := sorted(set(names) & (self._spec_names(module, 64, 128) - {"weight", "weight_scale"})):
            raise FormatError(f"{module}: has a tensor {lost[0]}, but not the others of format {form.name}")
        return False

    def _convert(self, module: str, names: Mapping[str, str], given: Mapping[str, Any]) -> None:
        n, k = self.form.check(module, given)
        ours = {last: name for last, name in names.items() if last in self._spec_names(module, n, k)}
        self._check_rest(module, {last: name for last, name in names.items() if last not in ours})
        tensors = {last: self.checkpoint.load(name) for last, name in ours.items()}
        try:
            weight = self.form.to_weight(module, tensors)
        except NotSparseError:
            self._keep_dense(module, ours, tensors)
            return
        if weight.scales is None and _outside_linear(module):
            self._add(module, {"weight": weight.to_dense_codes()})
            if not _is_embedding(module):
                self.summary.dense.append(module)
            return
        if self._stock is not None:
            self._add(module, tensors | {"weight": weight.to_dense_codes()}, less=_BITMASK)
            self.summary.sparse += 1
            return
        self._add(module, self._written(module, weight))

    def _convert_table(self, module: str, names: Mapping[str, str], given: Mapping[str, Any]) -> None:
        """Copy an embedding table in 8 bits, or write it in the model's dtype, to which its values are rounded."""
        check_table(module, given)
        tensors = {last: self.checkpoint.load(name) for last, name in names.items()}
        check_scales(module, tensors["weight_scale"])
        if self.to_dense:
            tensors = {"weight": dequantize_rows(tensors["weight"], tensors["weight_scale"], self.checkpoint.dtype)}
        self._add(module, tensors)

    def _written(self, module: str, weight: Sparse24Weight) -> dict[str, Tensor]:
        """Return the tensors to write for a 2:4 layer."""
        self.summary.sparse += 1
        kind = replace(weight.spec(weight.values.dtype), n=0, k=0, scale_dtype=None)
        if weight.scheme.scaled:
            kind = replace(kind, dtype=torch.float32)
            if self.to_dense:
                self._kinds.setdefault(kind, []).append(module)
        if self.to_dense:
            return dense_tensors(weight)
        self._kinds.setdefault(kind, []).append(module)
        if len(self._kinds) > 1:
            (one, (first, *_)), (other, (second, *_)) = list(self._kinds.items())[:2]
            raise FormatError(
                f"{second}: is stored as {_told(other)}, but {first} as {_told(one)}; the native format holds one "
                f"kind of layer, use --to dense"
            )
        return self._native(kind).from_weight(weight)

    def _keep_dense(self, module: str, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        """Write a layer that is not 2:4."""
        if not self.to_dense and "weight_scale" in names:
            raise FormatError(
                f"{module}: is quantized but not 2:4, which the native format cannot hold; use --to dense"
            )
        if isinstance(self.form, SparseBitmaskFormat):
            tensors = {**tensors, "weight": self.form.to_dense_codes(module, tensors)}
        self._add(module, tensors, less=_BITMASK)
        if not _is_embedding(module):
            self.summary.dense.append(module)

    def _copy(self, module: str, names: Mapping[str, str]) -> None:
        """Copy the tensors of what is not a layer of the format."""
        for last, name in names.items():
            if last in _KV_CACHE and not self.to_dense:
                self.summary.left_out.append(name)
                continue
            if "weight_scale" in names and not self.to_dense:
                raise FormatError(f"{module}: is quantized in a way that the native format cannot hold; use --to dense")
            if last.endswith("_proj") and len(self.checkpoint.tensors[name].shape) == 3 and not self.to_dense:
                raise FormatError(
                    f"{module}: holds all experts in one tensor {last}, but the native format has a weight for each; "
                    f"transformers' save_pretrained writes most models so"
                )
            if last == "weight" and len(self.checkpoint.tensors[name].shape) == 2 and not _is_embedding(module):
                self.summary.dense.append(module)
            self._write(name, self.checkpoint.load(name))

    def _check_rest(self, module: str, rest: Mapping[str, str]) -> None:
        """Write the bias; see to it that nothing else of a layer gets lost without a word."""
        for last, name in rest.items():
            if last == "bias":
                self._write(name, self.checkpoint.load(name))
            elif last in _KV_CACHE or self.form.renamed.get(f".{last}", "") is None:
                self.summary.left_out.append(name)
            elif not last.endswith("zero_point") or bool(self.checkpoint.load(name).any()):
                raise FormatError(f"{module}: has an unexpected tensor {last}")

    def _write_config(self) -> None:
        config = dict(self.checkpoint.config)
        for key in _CONFIG_KEYS:
            config.pop(key, None)
        if isinstance(config.get("text_config"), Mapping):
            config["text_config"] = {k: v for k, v in config["text_config"].items() if k not in _CONFIG_KEYS}
        if made := self._quantization_config():
            config["quantization_config"] = made
        self.writer.write_json("config.json", config)

    def _quantization_config(self) -> dict[str, Any] | None:
        if self._stock is not None:
            return self._stock
        if self.to_dense:
            return stock_config(self._kinds, self.summary.dense)
        if not self._kinds:
            raise FormatError(
                f"{self.checkpoint.path}: none of its linear layers is 2:4 in a scheme that the native format has"
            )
        native, ignore = self._native(next(iter(self._kinds))), tuple(sorted(self.summary.dense))
        return replace(native, ignore=ignore, embeddings=self.form.embeddings).to_config()

    def _native(self, kind: LinearSpec) -> Sparse24Format:
        value_dtype = "bfloat16" if kind.scheme.scaled else _DTYPE_NAMES[kind.dtype]
        scale_dtype = _DTYPE_NAMES[self._scale_dtype]
        static, symmetric = kind.static_input, kind.symmetric_input
        return Sparse24Format(kind.scheme, value_dtype, kind.group_size, scale_dtype, static, symmetric=symmetric)

    def _common_scale_dtype(self) -> torch.dtype:
        """Return the dtype of all weight scales, or float32, which holds them all exactly, where they differ."""
        endings = (".weight_scale", ".scale_packed", ".s")
        tables = {f"{table}.weight_scale" for table in self.form.embeddings}
        infos = {name: info for name, info in self.checkpoint.tensors.items() if name not in tables}.items()
        dtypes = {info.dtype for name, info in infos if name.endswith(endings) and info.dtype in _DTYPE_NAMES}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def _spec_names(self, module: str, n: int, k: int) -> set[str]:
        if isinstance(self.form, SparseBitmaskFormat):
            return {*_BITMASK, "weight_scale", "input_scale", "input_zero_point"}
        return {spec.name for spec in self.form.tensors(module, n, k, torch.bfloat16)}

    def _infos(self, names: Mapping[str, str]) -> dict[str, Any]:
        return {last: self.checkpoint.tensors[name] for last, name in names.items()}

    def _add(self, module: str, tensors: Mapping[str, Tensor], less: Sequence[str] = ()) -> None:
        for last, tensor in tensors.items():
            if last in less:
                continue
            self._write(f"{module}.{last}" if module else last, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        self.writer.add(name, tensor)
        self.summary.bytes_after += tensor.nbytes


def _stock_config(form: Format) -> dict[str, Any] | None:
    """Return the config of what is dense in compressed-tensors already; None if the converter has to make one."""
    return dict(form.stock) if isinstance(form, QuantizedFormat) else form.stock_config()


def _is_embedding(module: str) -> bool:
    name = module.rpartition(".")[2]
    return "embed" in name or name in ("wte", "wpe")


def _outside_linear(module: str) -> bool:
    """Return whether ``module`` is an embedding or the head, which vLLM does not run as linear layers."""
    return _is_embedding(module) or module.rpartition(".")[2] == "lm_head"


def _told(kind: LinearSpec) -> str:
    group = "" if kind.group_size == -1 else f", group size {kind.group_size}"
    static = ", static activations" if kind.static_input else ""
    return f"{kind.scheme.name}{group}{static}{'' if kind.symmetric_input else ', activations with a zero point'}"


def convert(source: str | Path, out: str | Path, to: str = "sparse24", force: bool = False) -> Summary:
    """Convert the checkpoint ``source`` into ``out``.

    Args:
        to: "sparse24", the native format, or "dense".
        force: replace ``out`` if it is not empty.

    Raises:
        FormatError: the source is none of the formats, or not what its config says, or has no 2:4 layer.
        OutputError: ``out`` cannot be written. Nothing is left behind.
    """
    if Path(source).resolve() == Path(out).resolve():
        raise OutputError(f"{out}: is the source; choose another output directory")
    with Checkpoint(source) as checkpoint:
        form = format_of(checkpoint)
        with CheckpointWriter(out, force, _SHARD_BYTES) as writer:
            for file in checkpoint.other_files():
                if file.name not in _NOT_COPIED:
                    writer.copy(file)
            return Converter(checkpoint, form, writer, to == "dense").run()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``vllm-sparse convert``."""
    parser.add_argument("source", metavar="SRC", help="directory of the checkpoint, in any of the formats")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="directory to write")
    parser.add_argument("--to", choices=("sparse24", "dense"), default="sparse24", help="format to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is not empty")


def run(args: argparse.Namespace) -> int:
    """Run ``vllm-sparse convert``."""
    summary = convert(args.source, args.out, args.to, args.force)
    layers = summary.sparse + len(summary.dense)
    print(f"{args.out}: {summary.sparse} of {layers} linear layers are 2:4, written as {args.to}")
    print(f"{summary.bytes_before / 1e6:.1f} MB before, {summary.bytes_after / 1e6:.1f} MB after")
    if summary.left_out:
        print(
            f"left out {len(summary.left_out)} tensors that the format has no place for, such as {summary.left_out[0]}"
        )
    return 0
