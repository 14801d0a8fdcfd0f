"""How far the work is: a bar with the time left on a terminal, a line per layer elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Counts ``total`` equal steps. Use as a context manager.

    Args:
        quiet: print nothing.
    """

    def __init__(self, total: int, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._total = total
        self._done = 0
        self._skipped = 0
        self._start = time.monotonic()
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._bar = None if quiet or not self._stream.isatty() else tqdm(total=total, unit="layer", file=self._stream)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, text: str) -> None:
        """One step is done; ``text`` says which and how."""
        self._done += 1
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
            self._bar.update()
            return
        left = (time.monotonic() - self._start) / (self._done - self._skipped) * (self._total - self._done)
        width = len(str(self._total))
        print(f"[{self._done:{width}d}/{self._total}] {text}  {clock(left)} left", file=self._stream, flush=True)

    def skip(self, steps: int, text: str) -> None:
        """Some steps were done in an earlier run, which says nothing about the time of those to come."""
        self._done += steps
        self._skipped += steps
        if self._bar is not None:
            self._bar.update(steps)
        self.say(text)

    def say(self, text: str) -> None:
        """Print a line that is no step."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif not self._quiet:
            print(text, file=self._stream, flush=True)


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
