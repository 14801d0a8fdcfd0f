"""Rules by which layers stay dense, and what they chose."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sparse.errors import OptionError

_RULES = ("owl", "kurtosis")


@dataclass(frozen=True)
class KeepDense:
    """A rule and how much it keeps; ``parse`` makes it of what a user writes.

    Attributes:
        rule: "owl", the share of outliers among |w| ||x|| (Yin et al., arXiv 2310.05175, section 3); "kurtosis", the
            fourth moment of a layer's inputs, of which rounding suffers.
        amount: below 1, the share of the weights that may stay dense at most; else how many groups of layers. Layers
            that read the same input (q, k and v; gate and up) and the experts of a block make one group.
    """

    rule: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> KeepDense:
        """Read ``rule:amount``; raise OptionError if it is none."""
        rule, _, amount = text.partition(":")
        try:
            number = float(amount)
        except ValueError:
            number = 0.0
        if rule not in _RULES or number <= 0 or (number >= 1 and number != int(number)):
            raise OptionError(
                f"unknown keep_dense {text!r}: expected owl or kurtosis, a colon, and a share of the weights below 1 "
                f"or a number of layers, such as owl:0.1"
            )
        return cls(rule, number)


@dataclass(frozen=True)
class Kept:
    """Layers that stay dense together.

    Attributes:
        layers: their names.
        score: by which they were chosen.
        extra_bytes: what that costs in the files.
    """

    layers: tuple[str, ...]
    score: float
    extra_bytes: int
