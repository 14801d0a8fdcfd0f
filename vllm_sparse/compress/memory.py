"""How the C library hands out memory while a CPU compresses: what one pass has freed, the next one takes."""

from __future__ import annotations

import ctypes

# Of mallopt, from <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_KEPT = 32 << 20  # bytes of a tensor; the most that glibc accepts
_MOST_KEPT = 1 << 30  # bytes that are free


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, for all threads together, instead of giving it back to the system.

    Each activation of a pass would otherwise be mapped, filled with zeros by the system and unmapped again, which is a
    tenth of the time. It holds for the rest of the process, and only where the C library is glibc.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
