"""Which file of the checkpoint a layer comes from, for the errors: vLLM's loaders hand over tensors alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparse.errors import FormatError, SparseError
from vllm_sparse.formats.checkpoint import Checkpoint


@dataclass(frozen=True)
class Origin:
    """Where a layer is stored.

    Attributes:
        model: directory or id of the model, empty where there is no engine.
        modules: the checkpoint's names for the layer or for the parts that vLLM fused.
    """

    model: str
    modules: tuple[str, ...]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the file before what a FormatError says; the model where several files or none are known to hold it."""
        try:
            yield
        except FormatError as error:
            if not self.model:
                raise
            raise type(error)(f"{self._file()}: {error}") from error

    def naming(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``loader``, a weight loader of vLLM, with its errors ``named``."""

        @functools.wraps(loader)
        def load(*arguments: Any, **named: Any) -> Any:
            with self.named():
                return loader(*arguments, **named)

        return load

    def _file(self) -> Path | str:
        folder = Path(self.model)
        try:
            with Checkpoint(folder) as checkpoint:
                ours = tuple(f"{module}." for module in self.modules)
                files = {info.file for name, info in checkpoint.tensors.items() if name.startswith(ours)}
        except SparseError:
            return self.model
        return folder / files.pop() if len(files) == 1 else self.model
