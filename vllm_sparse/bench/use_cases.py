"""The seven use cases of the published tables, in tokens of prompt and output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_sparse.errors import OptionError


@dataclass(frozen=True)
class UseCase:
    """One shape of request: ``prompt`` tokens in, ``output`` tokens out."""

    name: str
    title: str
    prompt: int
    output: int

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        return self.prompt + self.output

    def scaled(self, factor: float) -> UseCase:
        """Return the use case with both lengths multiplied by ``factor``, at least two tokens each."""
        prompt, output = (max(2, round(length * factor)) for length in (self.prompt, self.output))
        return UseCase(self.name, self.title, prompt, output)


USE_CASES = (
    UseCase("code-completion", "code completion", 256, 1024),
    UseCase("docstring", "docstring", 768, 128),
    UseCase("code-fixing", "code fixing", 1024, 1024),
    UseCase("rag", "RAG", 1024, 128),
    UseCase("instruction", "instruction following", 256, 128),
    UseCase("chat", "multi-turn chat", 512, 256),
    UseCase("summarization", "large summarization", 4096, 512),
)
SERVED = ("instruction", "chat")  # what throughput and serving measure unless use cases are named


def select(names: Sequence[str], scale: float) -> list[UseCase]:
    """Return the use cases called ``names``, in the table's order, their lengths multiplied by ``scale``.

    Raises:
        OptionError: a name is not one of the seven, or the scale is not in (0, 1].
    """
    known = [case.name for case in USE_CASES]
    if unknown := [name for name in names if name not in known]:
        raise OptionError(f"unknown use case {unknown[0]!r}: expected one of {', '.join(known)}")
    if not 0 < scale <= 1:
        raise OptionError(f"--scale {scale:g}: expected a factor above 0 and at most 1")
    return [case.scaled(scale) for case in USE_CASES if case.name in names]
