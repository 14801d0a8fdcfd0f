"""One line per measurement, with the time that is left."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Prints steps and an estimate of the time left, from what a unit of cost took so far.

    Args:
        cost: of all the work, in any unit.
    """

    def __init__(self, cost: float, out: TextIO | None = None) -> None:
        self._left, self._done = cost, 0.0
        self._begin = time.monotonic()
        self._out = out or sys.stderr

    def say(self, text: str) -> None:
        """Print a line."""
        print(f"[{self.left():>9}] {text}", file=self._out, flush=True)

    def done(self, cost: float, text: str) -> None:
        """Count ``cost`` as done, and print what came of it."""
        self.skip(cost)
        self._done += cost
        self.say(text)

    def skip(self, cost: float) -> None:
        """Count ``cost`` as not to be done."""
        self._left = max(0.0, self._left - cost)

    def left(self) -> str:
        """Return the time left in words, empty before anything is known."""
        if not self._done:
            return ""
        seconds = (time.monotonic() - self._begin) / self._done * self._left
        return f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"
