"""One block's Hessians: who shares an input, and how many tokens came by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_sparse.compress.hessian import CrossMoment, Hessian
from vllm_sparse.compress.residual import Streams


@dataclass(frozen=True)
class Group:
    """Layers that share an input.

    Attributes:
        names: of the layers.
        h: float32 ``[k, k]``, see ``Hessian``; None when no token reached them.
        tokens: that did.
        largest: the largest magnitude among them, a tensor without dimensions; None where nobody asked or none came.
        lack: of a layer that adds to the residual stream, the mean of e x^T, with e what the stream lacks of the dense
            model's and x the input, float32 ``[n, k]``; None where nobody asked.
    """

    names: tuple[str, ...]
    h: Tensor | None
    tokens: int
    largest: Tensor | None
    lack: Tensor | None = None


class InputStatistics:
    """What is known of the inputs that reach some layers, by the name of one layer for all that share an input.

    Args:
        ranges: also note the largest magnitude of each.
    """

    def __init__(self, ranges: bool) -> None:
        self._ranges = ranges
        self._hessians: dict[str, Hessian] = {}
        self._largest: dict[str, Tensor] = {}
        self._lacks: dict[str, CrossMoment] = {}

    def add(self, layer: str, x: Tensor, lack: Tensor | None) -> None:
        """Count inputs ``[..., k]``, and what the stream lacks with them, ``[..., n]``, see ``Streams.lack``."""
        if layer not in self._hessians:
            self._hessians[layer] = Hessian(x.shape[-1], x.device)
        self._hessians[layer].add(x)
        if self._ranges:
            largest = x.abs().amax()
            self._largest[layer] = torch.maximum(largest, self._largest.get(layer, largest))
        if lack is not None:
            if layer not in self._lacks:
                self._lacks[layer] = CrossMoment(lack.shape[-1], x.shape[-1], x.device)
            self._lacks[layer].add(lack, x)

    def hand_out(self, layer: str, names: tuple[str, ...]) -> Group:
        """Return what is known of the input of ``names``, once: its H is held no longer."""
        hessian = self._hessians.pop(layer, None)
        if hessian is None:
            return Group(names, None, 0, None)
        moment = self._lacks.pop(layer, None)
        lack = None if moment is None else moment.sum / hessian.tokens
        return Group(names, hessian.matrix(layer), hessian.tokens, self._largest.get(layer), lack)


class _AllSeenError(Exception):
    """Ends a forward pass where the rest of the block would only cost time."""


class BlockHessians:
    """Hooks on the linear layers of one block. Layers given the very same tensor (q, k, v; gate, up) share one H.

    Use as a context manager around the forward passes, and run each of them inside ``batch``.

    Args:
        ranges: also note the largest magnitude that reaches each layer.
        streams: what says what the residual stream lacks.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], ranges: bool = False, streams: Streams | None = None) -> None:
        self._linears = linears
        self._streams = streams
        self._statistics = InputStatistics(ranges)
        self._leader: dict[str, str] = {}
        self._seen: dict[int, tuple[Tensor, str]] = {}
        self._handles: list[Any] = []
        self._called: list[str] = []
        self._last: str | None = None

    def __enter__(self) -> BlockHessians:
        for name, linear in self._linears.items():
            self._handles.append(linear.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    @contextmanager
    def batch(self, number: int = 0) -> Iterator[None]:
        """Run the forward pass of batch ``number`` inside.

        It is cut short where no layer is left whose input has not been seen.
        """
        if self._streams is not None:
            self._streams.begin(number)
        try:
            yield
        except _AllSeenError:
            pass
        finally:
            if self._called and sorted(self._called) == sorted(self._linears):
                self._last = self._called[-1]  # else experts: whom the next batch calls is not known
            self._called.clear()
            self._seen.clear()  # a later tensor may live at the same address

    def groups(self) -> Iterator[Group]:
        """Yield what is known of every input. Each H is handed out once, so that only those still to come are held."""
        members: dict[str, list[str]] = {}
        for name in self._linears:
            members.setdefault(self.leader(name), []).append(name)
        for leader, names in members.items():
            yield self._statistics.hand_out(leader, tuple(names))

    def leader(self, layer: str) -> str:
        """Return the layer whose H is that of ``layer`` too."""
        return self._leader.get(layer, layer)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            self._called.append(name)
            if x.numel() == 0:  # an expert that no token was sent to
                return
            # Holding the tensor keeps its id from being given to another one before the pass ends.
            leader = self._seen.setdefault(id(x), (x, name))[1]
            # Who leads is decided in the first pass: a follower whose leader was not called would go uncounted.
            leader = self._leader.setdefault(name, leader)
            if leader == name:
                self._statistics.add(name, x, None if self._streams is None else self._streams.lack(name, x))
            if name == self._last and len(self._called) == len(self._linears):
                raise _AllSeenError

        return hook
