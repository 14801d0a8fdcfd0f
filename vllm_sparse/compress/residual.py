"""The residual stream: which layers of a block add to it, and what it lacks of the dense model's where they do.

Such a layer can make good what went wrong before it, as far as its own inputs tell. It is then solved for weights that
move its output towards the stream of the dense model, and not towards its own dense output alone.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_sparse.compress.model import BlockCall
from vllm_sparse.compress.products import cholesky, inverse_of_lower, product

_BLOCK = ""  # the name of the block itself among its modules


@dataclass(frozen=True)
class Write:
    """Where the stream is that a layer adds to.

    Attributes:
        before: the module whose input is the stream before; "" for the block.
        after: the module whose input is the stream afterwards; "" for the block's output.
    """

    before: str
    after: str


@dataclass
class _Seen:
    """What one pass showed.

    Attributes:
        streams: inputs of modules that have the stream's size, by name, in the order of the calls.
        inputs: of linear layers.
        outputs: those that have the stream's size.
        begun: how many of ``streams`` were seen before a layer's output.
    """

    streams: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)


def find_writes(
    block: nn.Module, linears: Mapping[str, nn.Linear], batch: tuple[BlockCall, Tensor]
) -> dict[str, Write]:
    """Return those of ``linears`` whose output is added to the stream as it is, as one batch shows it.

    Nothing needs to be known of the block: a layer counts where the input of some module, or of the block, plus its
    output is to the bit what reaches a later module, or leaves the block. That leaves those out whose output is scaled
    or normed first, or added together with another one's, and those that share their input with another layer.
    """
    seen, result = _watch(block, linears, batch)
    readers = Counter(id(x) for x in seen.inputs.values())
    writes = {}
    for name, output in seen.outputs.items():
        if readers[id(seen.inputs[name])] > 1:
            continue
        streams = list(seen.streams.items())
        earlier, later = streams[: seen.begun[name]], [*streams[seen.begun[name] :], (_BLOCK, result)]
        found = (Write(a, b) for a, x in earlier for b, y in later if _is_sum(x, output, y))
        if (write := next(found, None)) is not None:
            writes[name] = write
    return writes


def _watch(block: nn.Module, linears: Mapping[str, nn.Linear], batch: tuple[BlockCall, Tensor]) -> tuple[_Seen, Tensor]:
    """Run the block once; return what was seen inside and its output."""
    call, x = batch
    seen = _Seen(streams={_BLOCK: x})

    def before_module(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and _is_like(args[0], x):
                seen.streams[name] = args[0].reshape(x.shape)

        return hook

    def after_linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if _is_like(output, x):
                seen.begun[name], seen.outputs[name] = len(seen.streams), output.reshape(x.shape)
            seen.inputs[name] = args[0]

        return hook

    handles = [m.register_forward_pre_hook(before_module(name)) for name, m in block.named_modules() if name]
    handles += [linear.register_forward_hook(after_linear(name)) for name, linear in linears.items()]
    try:
        return seen, call.run(block, x)
    finally:
        for handle in handles:
            handle.remove()


def _is_like(a: Tensor, x: Tensor) -> bool:
    """Return whether ``a`` has as many tokens and channels as ``x``; some blocks put all tokens in one dimension."""
    return a.shape[-1:] == x.shape[-1:] and a.numel() == x.numel()


def _is_sum(a: Tensor, b: Tensor, c: Tensor) -> bool:
    """Return whether a + b is c, and b not nothing."""
    return torch.equal(a + b, c) and not torch.equal(a, c)


class _Pass(threading.local):
    """What is known of the pass that runs in this thread; several may run side by side.

    Attributes:
        number: of its batch.
        before: inputs of modules by name.
    """

    def __init__(self) -> None:
        self.number = 0
        self.before: dict[str, Tensor] = {}


class Streams:
    """Hooks on one block: the stream of the dense model, and what that of another pass lacks.

    Args:
        linears: layers of the block, by name.
        writes: those that add to the stream; without any nothing is lacking.
    """

    def __init__(self, block: nn.Module, linears: Mapping[str, nn.Linear], writes: Mapping[str, Write]) -> None:
        self._block, self._linears, self._writes = block, linears, writes
        self._wanted: dict[str, list[Tensor]] = {}
        self._inputs: Sequence[Tensor] = ()
        self._pass = _Pass()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Note the dense model's stream: run the dense block inside on its inputs, batch after batch."""
        handles = []
        for name in {write.after for write in self._writes.values()}:
            self._wanted[name] = []
            handles.append(self._notes(name, self._wanted[name]))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def compared(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Let ``lack`` be asked in passes inside, whose ``inputs`` of the block are these."""
        self._inputs = inputs
        names = {write.before for write in self._writes.values()} - {_BLOCK}
        handles = [self._block.get_submodule(name).register_forward_pre_hook(self._holds(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._wanted.clear()

    def begin(self, number: int) -> None:
        """Say that a pass of batch ``number`` begins in this thread."""
        self._pass.number, self._pass.before = number, {_BLOCK: self._inputs[number]} if self._writes else {}

    def lack(self, layer: str, x: Tensor) -> Tensor | None:
        """Return what this thread's stream will lack after ``layer`` is given ``x``, float32 ``[..., n]``.

        That is the dense model's stream minus the sum of this one's and the layer's output; None where the layer does
        not add to the stream.
        """
        if (write := self._writes.get(layer)) is None:
            return None
        linear = self._linears[layer]
        own = functional.linear(x, linear.weight, linear.bias)  # not a call, which would go through hooks
        wanted, before = self._wanted[write.after][self._pass.number], self._pass.before[write.before]
        # In the block's own precision, so that a stream that is the dense one lacks nothing.
        ours = before.reshape(own.shape) + own
        return wanted.reshape(own.shape).float() - ours.float()

    def _notes(self, name: str, streams: list[Tensor]) -> Any:
        if name != _BLOCK:
            module = self._block.get_submodule(name)
            return module.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
        return self._block.register_forward_hook(
            lambda module, args, output: streams.append(output[0] if isinstance(output, tuple) else output)
        )

    def _holds(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._pass.before[name] = args[0]

        return hook


def aimed(weight: Tensor, lack: Tensor, h: Tensor, share: float) -> Tensor:
    """Return W + ``share`` C h^-1: the dense weight and what makes most of the stream's lack good.

    Args:
        weight: the dense W, float32 ``[n, k]``.
        lack: C, the mean of e x^T over tokens, with e what the stream lacks and x the layer's input, ``[n, k]``.
        h: positive definite, the mean of x x^T, ``[k, k]``.
    """
    lower = cholesky(h)
    assert lower is not None  # it is positive definite
    root = inverse_of_lower(lower).T
    return weight + share * product(lack, product(root, root))
