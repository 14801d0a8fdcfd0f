"""The hidden states of all calibration tokens between two blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_sparse.compress.model import BlockCall, BlockModel
from vllm_sparse.compress.sequences import Sequences


class Activations:
    """The hidden states between two blocks, for all calibration tokens, and what each block is called with.

    Attributes:
        targets: the same in the dense model, which the compressed one works towards; empty without ``targeted``.
    """

    def __init__(self, model: BlockModel, sequences: Sequences | None, batch_tokens: int, targeted: bool) -> None:
        self._hidden: list[Tensor] = []
        self._calls: dict[torch.Size, list[BlockCall]] = {}
        if sequences is not None:
            for batch in sequences.batches(batch_tokens):
                embedded, self._calls[batch.shape] = model.embed(batch)
                self._hidden.append(embedded)
        self.targets = list(self._hidden) if targeted else []

    @property
    def is_empty(self) -> bool:
        """Whether there are no calibration tokens."""
        return not self._hidden

    def batches(self, index: int) -> list[tuple[BlockCall, Tensor]]:
        """Return the calls and inputs of block ``index``. While they are held, ``advance`` frees no input."""
        return [(self._calls[x.shape[:2]][index], x) for x in self._hidden]

    def advance(self, index: int, block: nn.Module) -> None:
        """Run all inputs through ``block``. In place, so that only one set of activations is ever held."""
        self._advance(self._hidden, index, block)

    def advance_targets(self, index: int, block: nn.Module) -> None:
        """Do the same with the targets; ``block`` is still dense."""
        self._advance(self.targets, index, block)

    def replace(self, hidden: list[Tensor]) -> None:
        """Take what came out of a block that was run elsewhere."""
        self._hidden = hidden

    def _advance(self, states: list[Tensor], index: int, block: nn.Module) -> None:
        for i, x in enumerate(states):
            states[i] = self._calls[x.shape[:2]][index].run(block, x)
