"""Several processes, as torchrun starts them: each calibrates on its share of the text and solves its share of layers.

Every process runs all blocks and ends each with the same weights, since it gets the finished ones of the others. The
first one writes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vllm_sparse.compress.calibrate import Group
from vllm_sparse.compress.sequences import Sequences

_TIMEOUT = timedelta(hours=2)  # of one block's layers, for which the others wait
_T = TypeVar("_T")


def _leave() -> None:
    """End the group's threads, which a process that ends must not find running."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class World:
    """The processes of a run: this one is number ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> World:
        """Meet the other processes that torchrun started, if it did."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(cls.local_device())
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size())

    @staticmethod
    def local_device() -> torch.device:
        """Return the GPU of this process."""
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def owner(self, number: int) -> int:
        """Return which process solves the ``number``-th group of layers of a block."""
        return number % self.size

    def share(self, sequences: Sequences | None) -> Sequences | None:
        """Return this process's share of the calibration text; see ``Sequences.share``."""
        return sequences if sequences is None or self.alone else sequences.share(self.rank, self.size)

    def from_one(self, value: _T, source: int = 0) -> _T:
        """Return the ``value`` that process ``source`` has."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    def largest(self, tensor: Tensor) -> Tensor:
        """Return the largest of each entry among all processes; changes ``tensor``."""
        if not self.alone:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of each entry over all processes; changes ``tensor``."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def most(self, count: int, device: torch.device) -> int:
        """Return the largest ``count`` among all processes."""
        return int(self.largest(torch.tensor([count], device=device)))

    def agree(self, answer: bool, device: torch.device) -> bool:
        """Return whether the answer is yes in every process."""
        no = torch.tensor([float(not answer)], device=device)
        return not bool(self.largest(no))

    def groups(self, local: Iterable[Group], linears: Mapping[str, nn.Linear]) -> Iterator[Group]:
        """Yield the groups of a block with H and tokens of all processes, the H in the process that solves it alone.

        Args:
            local: what this process has seen; others may have seen other experts.
            linears: the layers, by name.
        """
        seen = list(local)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, [group.names for group in seen])
        for number, names in enumerate(_joined(gathered, list(linears))):
            linear = linears[names[0]]
            own = [group for group in seen if group.names[0] in names and group.h is not None]
            k, device = linear.in_features, linear.weight.device
            total = torch.zeros(k, k, device=device)
            tokens, largest = torch.zeros(1, device=device), torch.full((1,), -1.0, device=device)
            for group in own:
                assert group.h is not None
                total += group.h * group.tokens
                tokens += group.tokens
                if group.largest is not None:
                    largest = group.largest.float().reshape(1)
            dist.reduce(total, self.owner(number))
            self.sum(tokens)
            self.largest(largest)
            count = int(tokens)
            top = largest[0] if float(largest) >= 0 else None
            lack = self._sum_lack(own, linear, number, count)
            yield Group(names, total / count if count else None, count, top, lack)

    def _sum_lack(self, own: Sequence[Group], linear: nn.Linear, number: int, count: int) -> Tensor | None:
        """Return that of all processes in the one that solves the ``number``-th group, whose layer is ``linear``."""
        known = [group for group in own if group.lack is not None]
        if self.agree(not known, linear.weight.device):
            return None
        total = torch.zeros(linear.weight.shape, device=linear.weight.device)
        for group in known:
            total += cast(Tensor, group.lack) * group.tokens
        dist.reduce(total, self.owner(number))
        return total / count


def _joined(gathered: Iterable[Sequence[tuple[str, ...]]], order: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the layers that share an input in any process, since one that saw no token cannot know."""
    together = {name: {name} for name in order}
    for names in (names for groups in gathered for names in groups):
        joined = set().union(*(together[name] for name in names))
        for name in joined:
            together[name] = joined
    found = {min(names, key=order.index): names for names in together.values()}
    return [tuple(sorted(found[name], key=order.index)) for name in order if name in found]


class Silent:
    """Takes the place of a ``CheckpointWriter`` in the processes that write nothing."""

    directory = Path()
    names: set[str] = set()
    total_bytes = 0

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def add(self, name: str, tensor: Tensor) -> None:
        """Do nothing."""
