"""A block run once for all calibration batches: each waits where a layer is not compressed yet.

Calibrating and then propagating runs every block twice. Here the forward pass of each batch is a thread that stops in
front of the first layer whose weight is still dense. When all of them have stopped, their inputs are added to that
layer's H in the order of the batches, the layer is compressed, and they go on with its new weight. As many passes run
at once as torch may use cores, each on its share of them: none waits for another within an operation, and sums do not
depend on which comes first.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vllm_sparse.compress.calibrate import BlockHessians, Group, InputStatistics
from vllm_sparse.compress.model import BlockCall
from vllm_sparse.compress.residual import Streams


class _AbandonedError(Exception):
    """Ends a forward pass whose result nobody needs."""


class _Pass(threading.Thread):
    """The forward pass of one batch. It runs from ``go_on`` to where it puts itself into ``back``.

    Args:
        cores: how many threads of torch's own it may use.
        begin: what to do first.

    Attributes:
        stopped_at: the layer that it waits in front of; None when it has ended.
        stopped_with: that layer's input, and what the residual stream lacks there.
        output: what the block made of the batch.
        error: what ended it, or None.
    """

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        x: Tensor,
        cores: int,
        begin: Callable[[], None],
        back: queue.SimpleQueue[_Pass],
    ) -> None:
        super().__init__(daemon=True)
        self.stopped_at: str | None = None
        self.stopped_with: tuple[Tensor, Tensor | None] | None = None
        self.output: Tensor | None = None
        self.error: BaseException | None = None
        self._work = (block, call, x)
        self._cores, self._begin, self._back = cores, begin, back
        self._abandoned = False
        self._go = threading.Semaphore(0)

    def run(self) -> None:
        torch.set_num_threads(self._cores)  # of this thread; see StagedBlock.close
        self._go.acquire()
        block, call, x = self._work
        try:
            if not self._abandoned:
                self._begin()
                with torch.no_grad():
                    self.output = call.run(block, x)
        except _AbandonedError:
            pass
        except BaseException as error:  # raised again where the pass was resumed
            self.error = error
        self.stopped_at = self.stopped_with = None
        self._back.put(self)

    def go_on(self) -> None:
        """Let it run to its next stop."""
        self._go.release()

    def stop(self, name: str, x: Tensor, lack: Tensor | None) -> None:
        """Wait, called in the pass itself, in front of layer ``name`` with its input and ``Streams.lack``."""
        self.stopped_at, self.stopped_with = name, (x, lack)
        self._back.put(self)
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


def run_side_by_side(block: nn.Module, batches: Sequence[tuple[BlockCall, Tensor]]) -> list[Tensor]:
    """Return what ``block`` makes of each batch, by the same operations as in stages, and so to the same bits."""
    passes = StagedBlock(block, {}, batches, {}, ranges=False, to_the_end=True)
    try:
        assert not list(passes.groups())  # there is no layer to stop at
        return passes.outputs()
    finally:
        passes.close()


class StagedBlock:
    """The forward passes of one block, layer by layer.

    Args:
        linears: the layers to compress, by name, in the order of the module tree.
        batches: call and input of each pass.
        leaders: the first layer with the same input, for each layer; see ``find_leaders``.
        ranges: see ``BlockHessians``.
        to_the_end: run what comes after the last layer too, which ``outputs`` needs.
        streams: see ``BlockHessians``.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        batches: Sequence[tuple[BlockCall, Tensor]],
        leaders: Mapping[str, str],
        ranges: bool,
        to_the_end: bool,
        streams: Streams | None = None,
    ) -> None:
        self._streams = streams or Streams(block, {}, {})
        self._leaders, self._to_the_end = leaders, to_the_end
        self._order = list(linears)
        self._threads = torch.get_num_threads()
        self._at_once = max(1, min(self._threads, len(batches)))
        self._back: queue.SimpleQueue[_Pass] = queue.SimpleQueue()
        cores = self._threads // self._at_once
        self._passes = [
            _Pass(block, call, x, cores, partial(self._streams.begin, number), self._back)
            for number, (call, x) in enumerate(batches)
        ]
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
            here = [one for one in waiting if self._leaders[str(one.stopped_at)] == leader]
            for one in here:
                assert one.stopped_with is not None  # it has stopped
                self._statistics.add(leader, *one.stopped_with)
            yield self._group(leader)
            if len(self._done) == len(self._order) and not self._to_the_end:
                return
            self._resume(here)
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
        # What a pass set for itself torch also takes for threads that are started later.
        torch.set_num_threads(self._threads)

    def _group(self, leader: str) -> Group:
        names = tuple(name for name in self._order if self._leaders[name] == leader and name not in self._done)
        self._done.update(names)
        return self._statistics.hand_out(leader, names)

    def _resume(self, passes: Sequence[_Pass]) -> None:
        """Let ``passes`` run to their next stops, several at once."""
        rest = iter(passes)
        for one in islice(rest, self._at_once):
            one.go_on()
        for _ in passes:
            one = self._back.get()
            if one.error is not None:
                raise one.error
            if (following := next(rest, None)) is not None:
                following.go_on()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            one = threading.current_thread()
            if name not in self._done and args[0].numel() and isinstance(one, _Pass):
                one.stop(name, args[0], self._streams.lack(name, args[0]))

        return hook
