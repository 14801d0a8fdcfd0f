"""The errors a user can cause: one sentence each, naming what was wanted, what was given, and the layer or file."""


class SparseError(Exception):
    """Base of every error this package raises on purpose."""


class FormatError(SparseError, ValueError):
    """A checkpoint, its config or one of its tensors is not what its format says."""


class NotSparseError(FormatError):
    """A weight that has to be 2:4 has groups with more than two non-zeros."""


class UnsupportedError(SparseError, ValueError):
    """A valid request that this build, machine or version cannot serve; the message says why."""


class OptionError(SparseError, ValueError):
    """A command-line, recipe or plugin option that does not exist or does not fit."""


class OutputError(SparseError, OSError):
    """The output cannot be written: it exists, or the disk is full."""


class EngineError(SparseError, RuntimeError):
    """An engine or a server does not load, ended, refuses, or does not answer."""
