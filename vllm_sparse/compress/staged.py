"""A block run once for all calibration batches: each waits where a layer is not compressed yet.

Calibrating and then propagating runs every block twice. Here the forward pass of each batch is a thread that stops in
front of the first layer whose weight is still dense, where its input is added to that layer's H. When all of them have
stopped, the layer is compressed, and they go on with its new weight. One thread runs at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_sparse.compress.calibrate import BlockHessians, Group, InputStatistics
from vllm_sparse.compress.model import BlockCall


class _AbandonedError(Exception):
    """Ends a forward pass whose result nobody needs."""


class _Pass(threading.Thread):
    """The forward pass of one batch. It runs only while somebody is inside ``resume``.

    Attributes:
        stopped_at: the layer that it waits in front of; None when it has ended.
        output: what the block made of the batch.
    """

    def __init__(self, block: nn.Module, call: BlockCall, x: Tensor) -> None:
        super().__init__(daemon=True)
        self.stopped_at: str | None = None
        self.output: Tensor | None = None
        self._work = (block, call, x)
        self._error: BaseException | None = None
        self._abandoned = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        self._go.acquire()
        block, call, x = self._work
        try:
            if not self._abandoned:
                with torch.no_grad():
                    self.output = call.run(block, x)
        except _AbandonedError:
            pass
        except BaseException as error:  # raised again where the pass was resumed
            self._error = error
        self.stopped_at = None
        self._back.release()

    def resume(self) -> None:
        """Let it run to its next stop."""
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self, name: str) -> None:
        """Wait, called in the pass itself, in front of layer ``name``."""
        self.stopped_at = name
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _AbandonedError

    def abandon(self) -> None:
        """End it where it is."""
        self._abandoned = True
        self._go.release()
        self.join()


def find_leaders(block: nn.Module, linears: Mapping[str, nn.Linear], batch: tuple[BlockCall, Tensor]) -> dict[str, str]:
    """Return for each of ``linears`` the first one that is given the same input, as one batch shows it."""
    call, x = batch
    with BlockHessians(linears) as hessians, hessians.batch():
        call.run(block, x)
    return {name: hessians.leader(name) for name in linears}


class StagedBlock:
    """The forward passes of one block, layer by layer.

    Args:
        linears: the layers to compress, by name, in the order of the module tree.
        batches: call and input of each pass.
        leaders: the first layer with the same input, for each layer; see ``find_leaders``.
        ranges: see ``BlockHessians``.
        to_the_end: run what comes after the last layer too, which ``outputs`` needs.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        batches: Sequence[tuple[BlockCall, Tensor]],
        leaders: Mapping[str, str],
        ranges: bool,
        to_the_end: bool,
    ) -> None:
        self._leaders, self._to_the_end = leaders, to_the_end
        self._order = list(linears)
        self._passes = [_Pass(block, call, x) for call, x in batches]
        self._running: _Pass | None = None
        self._statistics = InputStatistics(ranges)
        self._done: set[str] = set()
        self._handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in linears.items()]
        for one in self._passes:
            one.start()

    def groups(self) -> Iterator[Group]:
        """Yield the layers that share an input and what is known of it. Their new weights must be in place at the next.

        Layers that no token reached come last.
        """
        self._resume(self._passes)
        while waiting := [one for one in self._passes if one.stopped_at is not None]:
            leader = min((self._leaders[str(one.stopped_at)] for one in waiting), key=self._order.index)
            yield self._group(leader)
            if len(self._done) == len(self._order) and not self._to_the_end:
                return
            self._resume([one for one in waiting if self._leaders[str(one.stopped_at)] == leader])
        for name in self._order:
            if name not in self._done:
                yield self._group(name)

    def outputs(self) -> list[Tensor]:
        """Return what the compressed block made of each batch, once ``groups`` has ended."""
        return [one.output for one in self._passes if one.output is not None]

    def close(self) -> None:
        """Take the hooks out and end what is still running."""
        for handle in self._handles:
            handle.remove()
        for one in self._passes:
            if one.is_alive():
                one.abandon()

    def _group(self, leader: str) -> Group:
        names = tuple(name for name in self._order if self._leaders[name] == leader and name not in self._done)
        self._done.update(names)
        return self._statistics.hand_out(leader, names)

    def _resume(self, passes: Sequence[_Pass]) -> None:
        for one in passes:
            self._running = one
            one.resume()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, one = args[0], self._running
            if name in self._done or x.numel() == 0 or one is None:
                return
            self._statistics.add(self._leaders[name], x)
            one.stop(name)

        return hook
