"""A causal language model that is never whole in memory: a skeleton on the meta device, filled block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_sparse.compress.attention import FastAttention
from vllm_sparse.compress.experts import Part, renamed, take_apart
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.formats.checkpoint import Checkpoint


@dataclass
class BlockCall:
    """What the model passes to one block besides the hidden states, recorded for one shape of input."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None = None  # the keyword of the hidden states, or None when they come first

    def outputs(self, block: nn.Module, hidden: Tensor) -> Any:
        """Return what ``block`` makes of ``hidden``: hidden states, or a tuple that starts with them."""
        if self.hidden_name is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.hidden_name: hidden}, **self.kwargs)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the hidden states that ``block`` makes of ``hidden``."""
        with FastAttention() if hidden.device.type == "cpu" else nullcontext():
            output = self.outputs(block, hidden)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class _Recorder:
    """Stands in for the forward of every block: notes its arguments and passes the hidden states on."""

    blocks: int
    as_tuple: bool
    calls: list[BlockCall] = field(default_factory=list)
    first: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, call = args[0], BlockCall(args[1:], kwargs)
        else:
            name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
            hidden, call = kwargs.pop(name), BlockCall((), kwargs, name)
        self.first = hidden if self.first is None else self.first
        self.calls.append(call)
        if len(self.calls) == self.blocks:
            raise _LastBlockError
        return (hidden,) if self.as_tuple else hidden


class _LastBlockError(Exception):
    """Ends a forward pass where the final norm and the head would only cost time."""


class BlockModel:
    """The repeated blocks of a Hugging Face causal LM, loaded one at a time.

    Attributes:
        checkpoint: where the weights come from.
        config: the transformers config.
        blocks: the blocks, on the meta device until ``load``.
        prefix: their name in the model, such as ``model.layers``.
        packed: tensors of the checkpoint that hold all experts, and what each part of them is called when it is
            written on its own.

    Args:
        device, dtype: where and in what precision loaded modules run.

    Raises:
        FormatError: not a model that transformers knows, or a weight is missing from the checkpoint.
        UnsupportedError: its blocks hold no nn.Linear, or experts that are none.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self._device, self._dtype = device, dtype
        if "quantization_config" in checkpoint.config:
            raise UnsupportedError(f"{checkpoint.path}: the model is quantized already; give the unquantized one")
        try:
            self.config = AutoConfig.from_pretrained(checkpoint.path)
            with _parameters_on_meta():
                self._model = _build(self.config)
        except (ValueError, KeyError, OSError, AttributeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise FormatError(
                f"{checkpoint.path}: not a causal language model transformers can build ({reason})"
            ) from error
        self._model.requires_grad_(False)
        self._parts = take_apart(self._model, str(checkpoint.path))
        self.prefix, self.blocks = _repeated_blocks(self._model, str(checkpoint.path))
        self.packed: dict[str, dict[str, Part]] = {}
        self._last_packed = "", torch.empty(0)
        self._file_names = self._match_names()
        self._as_tuple: bool | None = None
        self._load_surroundings()

    def linears(self, block: int) -> dict[str, nn.Linear]:
        """Return the linear layers of a block by their full name in the model."""
        start = f"{self.prefix}.{block}."
        return {start + name: m for name, m in self.blocks[block].named_modules() if isinstance(m, nn.Linear)}

    def all_linears(self) -> dict[str, nn.Linear]:
        """Return every linear layer of the model, the head included, by full name."""
        return {name: m for name, m in self._model.named_modules() if isinstance(m, nn.Linear)}

    def routers(self) -> list[str]:
        """Return the matrices inside blocks that are no nn.Linear, by module: what chooses experts, in transformers."""
        return [
            f"{self.prefix}.{name}"
            for name, module in self.blocks.named_modules()
            if not isinstance(module, nn.Linear | nn.Embedding)
            and (weight := dict(module.named_parameters(recurse=False)).get("weight")) is not None
            and weight.dim() == 2
        ]

    def embeddings(self) -> str:
        """Return the name of the table of token embeddings; raise UnsupportedError if it is no nn.Embedding."""
        table = self._model.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise UnsupportedError(
                f"{self.checkpoint.path}: its token embeddings are no nn.Embedding but a {type(table).__name__}, and "
                f"have to stay dense"
            )
        return next(name for name, module in self._model.named_modules() if module is table)

    def file_name(self, parameter: str) -> str:
        """Return what the checkpoint calls ``parameter`` of the model; a tied head is not in it and keeps its name."""
        return self._file_names.get(parameter, parameter)

    def load(self, block: int) -> nn.Module:
        """Fill a block with its weights, on the device.

        Raises:
            FormatError: a weight has the wrong shape, or holds NaN or Inf.
        """
        self._fill(self.blocks[block], f"{self.prefix}.{block}.")
        return self.blocks[block]

    def release(self, block: int) -> None:
        """Give the memory of a block back. It cannot be loaded again."""
        self.blocks[block].to("meta")

    def whole(self, dtype: torch.dtype) -> tuple[nn.Module, list[nn.Module]]:
        """Return the dense model, all of it on the device, and its blocks; only this call needs so much memory.

        Raises:
            UnsupportedError: it has no head.
        """
        if self._model.get_output_embeddings() is None:
            raise UnsupportedError(f"{self.checkpoint.path}: has no head that predicts tokens, which curvature needs")
        model = type(self._model).from_pretrained(self.checkpoint.path, dtype=dtype)
        model = model.to(self._device).eval().requires_grad_(False)
        return model, list(model.get_submodule(self.prefix))

    @torch.no_grad()
    def embed(self, ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Return the hidden states that reach the first block for ``ids`` ``[batch, length]``, and each block's call.

        The calls hold for every input of the same shape.
        """
        if self._as_tuple is None:
            recorder = self._record(ids, as_tuple=False, blocks=1)
            assert recorder.first is not None
            block = self.load(0)
            self._as_tuple = isinstance(recorder.calls[0].outputs(block, recorder.first), tuple)
        recorder = self._record(ids, self._as_tuple, len(self.blocks))
        assert recorder.first is not None
        return recorder.first, recorder.calls

    def _record(self, ids: Tensor, as_tuple: bool, blocks: int) -> _Recorder:
        recorder = _Recorder(blocks, as_tuple)
        for block in self.blocks:
            block.forward = recorder
        try:
            self._model(input_ids=ids.to(self._device), use_cache=False)
        except _LastBlockError:
            pass
        finally:
            for block in self.blocks:
                del block.forward
        return recorder

    def _load_surroundings(self) -> None:
        """Load what runs before and between the blocks; the head never runs here."""
        head = self._model.get_output_embeddings()
        for name, module in self._model.named_modules():
            inside = name == self.prefix or name.startswith(self.prefix + ".")
            if not inside and module is not head and next(module.parameters(recurse=False), None) is not None:
                self._fill(module, f"{name}." if name else "", recurse=False)
        # Buffers that are no part of the checkpoint (rotary frequencies) were computed on the CPU.
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta":
                    setattr(module, name, buffer.to(self._device))

    def _fill(self, module: nn.Module, start: str, recurse: bool = True) -> None:
        names = [name for name, _ in module.named_parameters(recurse=recurse, remove_duplicate=False)]
        names += [name for name, _ in module.named_buffers(recurse=recurse) if start + name in self._file_names]
        for name in names:
            owner, _, last = name.rpartition(".")
            target = module.get_submodule(owner)
            old = getattr(target, last)
            new = self._read(start + name, old)
            setattr(target, last, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)

    def _read(self, parameter: str, old: Tensor) -> Tensor:
        file_name = self._file_names[parameter]
        if file_name in self.checkpoint.tensors:
            tensor = self.checkpoint.load(file_name)
        else:
            packed, part = next(
                (packed, parts[file_name]) for packed, parts in self.packed.items() if file_name in parts
            )
            if self._last_packed[0] != packed:  # all experts of a layer are read one after the other
                self._last_packed = packed, self.checkpoint.load(packed)
            tensor = self._last_packed[1][part.expert, part.rows]
        if tensor.shape != old.shape:
            raise FormatError(f"{parameter}: expected shape {list(old.shape)}, the checkpoint has {list(tensor.shape)}")
        if not tensor.is_floating_point():
            return tensor.to(self._device)
        tensor = tensor.to(self._device)
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{parameter}: the weight holds NaN or Inf")
        return tensor.to(self._dtype)

    def _match_names(self) -> dict[str, str]:
        """Return the checkpoint's name of every tensor of the model; some drop or add the base model's prefix."""
        base = f"{self._model.base_model_prefix}."
        head = {id(p) for p in getattr(self._model.get_output_embeddings(), "parameters", list)()}
        found = {}
        stored = {name: name for name in self.checkpoint.tensors}
        tensors = self._model.state_dict(keep_vars=True)
        parameters = [name for name, t in tensors.items() if isinstance(t, nn.Parameter) and id(t) not in head]
        if any(_stored_name(name, base, stored) is None for name in parameters):  # else nobody need ask transformers
            stored = {renamed(name, self.config.model_type): name for name in self.checkpoint.tensors} | stored
        for name, tensor in tensors.items():
            if (file_name := _stored_name(name, base, stored)) is not None:
                found[name] = file_name
            elif name in self._parts and (packed := _stored_name(self._parts[name].tensor, base, stored)) is not None:
                found[name] = ".".join((packed.rpartition(".")[0], *name.split(".")[-3:]))
                self.packed.setdefault(packed, {})[found[name]] = self._parts[name]
            elif id(tensor) not in head and isinstance(tensor, nn.Parameter):
                raise FormatError(f"{self.checkpoint.path}: there is no tensor {name}, which the model needs")
        return found


def _build(config: Any) -> Any:
    """Return the model of ``config`` as its checkpoint has it: the class that it names, or else a causal LM."""
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32) if kind is None else kind(config).float()
    return model.eval()


def _stored_name(name: str, base: str, stored: Mapping[str, str]) -> str | None:
    """Return the file's name of ``name`` of the model, which may lack the prefix ``base``, or have one too many."""
    candidates = (name, name.removeprefix(base), base + name)
    return next((stored[candidate] for candidate in candidates if candidate in stored), None)


def _repeated_blocks(model: nn.Module, path: str) -> tuple[str, nn.ModuleList]:
    """Return the outermost list of modules that holds the most linear weights."""
    best, weights = None, 0
    outer = ""
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or (outer and name.startswith(outer)):
            continue
        outer = name + "."
        count = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        if count > weights:
            best, weights = (name, module), count
    if best is None:
        raise UnsupportedError(f"{path}: no repeated blocks with nn.Linear layers in a {type(model).__name__}")
    return best


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules be built without memory for parameters; buffers are computed as usual."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.device.type == "meta":
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()
