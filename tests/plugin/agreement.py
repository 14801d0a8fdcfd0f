"""What vLLM generated against a reference model, in a table that a test run ends with.

Everything runs in float32, where sums in another order move a log-probability by less than 1e-4. Where activations are
quantized they also turn a few codes over a rounding edge, each of which moves its activation by 1/127 of the token's
largest (int8) or 1/16 of itself (e4m3). How much that does depends on the model, so the reference itself is asked: its
inputs are moved by the rounding of float32 before it quantizes them, a few times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.plugin.models import InputQuantizer
from tests.tables import add_row

EXACT = 1e-4
_NOISE = 1e-6  # relative; a few times what float32 rounds to
_DRAWS, _SLACK = 3, 2
_TITLE = "vLLM on the CPU against the reference, log-probabilities of greedy tokens"
_HEAD = ("format", "scheme", "", "tokens the same", "largest difference", "allowed")


@dataclass(frozen=True)
class Continuation:
    """Tokens that vLLM chose, the most likely each time, and the natural logarithm of their probabilities."""

    tokens: list[int]
    logprobs: list[float]


def assert_greedy(
    model: PreTrainedModel,
    prompts: list[list[int]],
    continued: list[Continuation],
    row: tuple[str, str, str] | None = None,
) -> None:
    """Assert that every token is the one the reference would choose, with the same probability, within the error.

    Args:
        row: format, scheme and remark, to show the comparison in the table.
    """
    model = model.float().eval()
    gaps, differences, allowed = [], [], EXACT
    for prompt, one in zip(prompts, continued, strict=True):
        tokens = torch.tensor(one.tokens)[:, None]
        logits = _logits(model, prompt, one.tokens)
        gaps.append(logits.max(-1).values - logits.gather(-1, tokens)[:, 0])
        differences.append((_logprobs(model, prompt, one.tokens) - torch.tensor(one.logprobs)).abs())
        allowed = max(allowed, _SLACK * _rounding_error(model, prompt, one.tokens))
    gap, difference = torch.cat(gaps), float(torch.cat(differences).max())
    if row is not None:
        same = f"{int((gap == 0).sum())} of {gap.numel()}"
        add_row(_TITLE, _HEAD, (*row, same, f"{difference:.1e}", f"{allowed:.1e}"))
    assert float(gap.max()) <= allowed, f"logits below the best: {gap.tolist()}, allowed {allowed}"
    assert difference <= allowed, f"log-probability off by {difference}, allowed {allowed}"


def assert_same(continued: list[Continuation], dense: list[Continuation], row: tuple[str, str, str]) -> None:
    """Assert that a 2:4 model says what vLLM says with the same weights, dense; ``row`` is as in ``assert_greedy``."""
    pairs = list(zip(continued, dense, strict=True))
    same = sum(a == b for one, other in pairs for a, b in zip(one.tokens, other.tokens, strict=True))
    total = sum(len(one.tokens) for one in continued)
    differences = [abs(a - b) for one, other in pairs for a, b in zip(one.logprobs, other.logprobs, strict=True)]
    add_row(_TITLE, _HEAD, (*row, f"{same} of {total}", f"{max(differences):.1e}", f"{EXACT:.1e}"))
    assert same == total, f"{total - same} of {total} tokens are others than those of the dense model"
    assert max(differences) <= EXACT


def _logits(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]


def _logprobs(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> Tensor:
    """Return the log-probability of each of ``tokens``."""
    return _logits(model, prompt, tokens).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def _rounding_error(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> float:
    """Return how far log-probabilities move when inputs move by ``_NOISE`` before they are quantized, 0 without."""
    quantizer = getattr(model, "input_quantizer", None)
    if not isinstance(quantizer, InputQuantizer):
        return 0.0
    still, error = _logprobs(model, prompt, tokens), 0.0
    for seed in range(_DRAWS):
        torch.manual_seed(seed)
        quantizer.noise = _NOISE
        error = max(error, float((_logprobs(model, prompt, tokens) - still).abs().max()))
        quantizer.noise = 0.0
    return error
