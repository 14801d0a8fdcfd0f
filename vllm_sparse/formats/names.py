"""Lists of module names in a checkpoint's config: exact names, and ``re:`` patterns matched from the start of a name.

A config may come from anyone, so a pattern that takes exponential time must not hold up whoever reads it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import regex

from vllm_sparse.errors import FormatError

_LONGEST, _MOST = 1000, 1000  # characters of a pattern, patterns of a list
_SECONDS = 1.0  # per name; a plain pattern takes microseconds


def names_in(value: Any, what: str) -> tuple[str, ...]:
    """Return a config's list of module names and ``re:`` patterns; raise FormatError if it is anything else."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise FormatError(f"quantization_config: {what} must be a list of module names")
    patterns = [entry for entry in value if entry.startswith("re:")]
    if len(patterns) > _MOST:
        raise FormatError(f"quantization_config: {what} has {len(patterns)} patterns, more than {_MOST}")
    for entry in patterns:
        if len(entry) > _LONGEST:
            raise FormatError(f"quantization_config: {what} has a pattern of more than {_LONGEST} characters")
        try:
            re.compile(entry[3:])
            regex.compile(entry[3:])
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise FormatError(f"quantization_config: {what} has a bad pattern {entry!r} ({error})") from error
    return tuple(value)


def is_ignored(module: str, names: Sequence[str]) -> bool:
    """Return whether ``names`` has ``module``: by its exact name, or by ``re:`` and a regular expression.

    Raises:
        FormatError: a pattern takes too long.
    """
    exact, patterns = _compiled(tuple(names))
    return module in exact or any(_matches(pattern, module) for pattern in patterns)


@functools.lru_cache(maxsize=64)
def _compiled(names: tuple[str, ...]) -> tuple[frozenset[str], tuple[Any, ...]]:
    patterns = tuple(regex.compile(name[3:]) for name in names if name.startswith("re:"))
    return frozenset(name for name in names if not name.startswith("re:")), patterns


def _matches(pattern: Any, module: str) -> bool:
    try:
        return pattern.match(module, timeout=_SECONDS) is not None
    except TimeoutError:
        raise FormatError(
            f"quantization_config: the pattern 're:{pattern.pattern}' takes more than {_SECONDS:g} s for {module!r}"
        ) from None
