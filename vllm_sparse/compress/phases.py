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
        peak_bytes: by phase, the most memory that tensors held on the GPU; empty on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent inside to phase ``name``."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started
            if self._device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self._device)
                self.peak_bytes[name] = max(peak, self.peak_bytes.get(name, 0))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()
