"""Where the time goes: seconds by phase of a run, and the most device memory it held."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Adds up the wall time of named phases. A GPU is waited for at both ends of each.

    Attributes:
        seconds: by phase, in the order in which they first came.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent inside to phase ``name``."""
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def peak_bytes(self) -> int | None:
        """Return the most memory that tensors held on the GPU, None where there is none."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()
