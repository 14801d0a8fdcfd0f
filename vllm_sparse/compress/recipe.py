"""What to do to a model: the options of ``compress``, from the command line, a YAML file or Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from vllm_sparse.compress.keep_dense import KeepDense
from vllm_sparse.compress.llm_compressor import convert_recipe, is_llm_compressor
from vllm_sparse.compress.output import OUTPUTS
from vllm_sparse.compress.pattern import Pattern
from vllm_sparse.errors import OptionError
from vllm_sparse.scheme import GROUP_SIZES, get_scheme

PRUNERS = ("admm", "sparsegpt", "wanda", "magnitude", "none")
ACTIVATIONS = ("dynamic", "static")
QUANTIZERS = ("gptq", "joint", "rtn")
EMBEDDINGS = ("dense", "int8")
# Routers decide which expert sees a token: few weights, and an error in one changes everything after it.
ALWAYS_DENSE = ("lm_head", r"re:.*[._](gate|router)$")
_ITERATIONS = 20
_NOT_IMPROVED = ("magnitude", "none")  # by default, unless there is something else to work towards
_TYPES: dict[str, tuple[type, ...]] = {
    "scheme": (str,),
    "pruner": (str,),
    "quantizer": (str,),
    "pattern": (str,),
    "format": (str,),
    "activation": (str,),
    "smooth": (int, float),
    "keep_dense": (str,),
    "embeddings": (str,),
    "group_size": (int, type(None)),
    "iterations": (int, type(None)),
    "dampening": (int, float),
    "refine": (int,),
    "generate": (int,),
    "curvature": (int,),
    "residual": (int, float),
    "ignore": (list, tuple),
    "num_samples": (int,),
    "seq_len": (int,),
    "seed": (int,),
}


@dataclass(frozen=True)
class Recipe:
    """The choices that decide the compressed weights.

    Attributes:
        scheme: bf16, fp8, int8, w4a16 or w8a16.
        pattern: 2:4, another N:M (N kept of every M), or the share of zeros, such as 0.5.
        format: what is written: sparse24, or dense, with its zeros, which stock vLLM and transformers load.
        activation: dynamic, or static: one scale per layer, from calibration (fp8 and int8).
        smooth: strength of SmoothQuant, 0 to 1; 0 for none.
        keep_dense: rule and amount for layers that stay dense besides ``ignore``, such as owl:0.1; "" for none.
        embeddings: dense, or int8: the table of token embeddings becomes codes, rounded to nearest, and a scale for
            each token; a head that shares the table reads them too. Format sparse24 alone.
        pruner: how the mask is chosen; "none" takes a model that is pruned already.
        quantizer: gptq, rtn, or joint (SparseGPT's own pass, which prunes and rounds together).
        group_size: input features per scale; None: 128 for weight-only schemes, per channel for the others.
        iterations: of least squares on the kept weights; None: 20 after a pruner that looks at inputs, else 0.
        dampening: share of the mean diagonal added to H.
        refine: training steps per block on the kept weights, against the dense block's output.
        generate: sequences that the dense model writes itself, added to the calibration ones. Training on few
            sequences learns them by heart.
        curvature: calibration sequences from which it is found what errors of a layer's outputs cost the model, all
            together; they are then weighed by it, and made good in each other. 0: every output for itself.
        residual: share, 0 to 1, of what the residual stream lacks of the dense model's that layers which add to it are
            to make good; 0: each works towards its own dense output alone.
        ignore: layers that stay dense, by exact name or ``re:`` and a regular expression, besides ``ALWAYS_DENSE``.
        num_samples, seq_len: calibration sequences and their length in tokens.
        seed: of the choice of sequences.

    Raises:
        OptionError: an option is unknown, or does not fit another one.
    """

    scheme: str = "w4a16"
    pattern: str = "2:4"
    format: str = "sparse24"
    activation: str = "dynamic"
    smooth: float = 0.0
    keep_dense: str = ""
    embeddings: str = "dense"
    pruner: str = "admm"
    quantizer: str = "gptq"
    group_size: int | None = None
    iterations: int | None = None
    dampening: float = 0.01
    refine: int = 0
    generate: int = 0
    curvature: int = 0
    residual: float = 0.0
    ignore: tuple[str, ...] = ()
    num_samples: int = 128
    seq_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        scheme = get_scheme(self.scheme)
        _check_choice("pruner", self.pruner, PRUNERS)
        _check_choice("quantizer", self.quantizer, QUANTIZERS)
        _check_choice("format", self.format, OUTPUTS)
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("embeddings", self.embeddings, EMBEDDINGS)
        if self.embeddings != "dense" and self.format != "sparse24":
            raise OptionError(f"embeddings {self.embeddings} can only be written with format sparse24")
        if self.format != "dense" and not self.mask_pattern.two_of_four:
            raise OptionError(f"pattern {self.pattern} is not 2:4 and can only be written with format dense")
        if self.static_input and scheme.activation is None:
            raise OptionError(
                f"activation static does not fit scheme {scheme.name}, which does not quantize activations"
            )
        if self.quantizer == "joint" and self.pruner != "sparsegpt":
            raise OptionError(f"quantizer joint is a mode of pruner sparsegpt and cannot follow {self.pruner}")
        size = self.group_size if self.group_size is not None else (128 if scheme.grouped else -1)
        if size not in (GROUP_SIZES if scheme.grouped else (-1,)):
            wanted = ", ".join(map(str, GROUP_SIZES)) if scheme.grouped else "-1, since it has one scale per channel"
            raise OptionError(f"group size {size} does not fit scheme {scheme.name}: expected {wanted}")
        for name, least in (("num_samples", 1), ("seq_len", 1), ("refine", 0), ("generate", 0), ("curvature", 0)):
            if getattr(self, name) < least:
                raise OptionError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.keep_dense:
            KeepDense.parse(self.keep_dense)
        for name in ("dampening", "smooth", "residual"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        object.__setattr__(self, "group_size", size)
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if self.iterations is None:
            improved = self.pruner not in _NOT_IMPROVED or self.residual > 0
            object.__setattr__(self, "iterations", _ITERATIONS if improved else 0)
        elif self.iterations < 0:
            raise OptionError(f"iterations must not be negative, got {self.iterations}")

    @property
    def group(self) -> int:
        """The group size, with the default resolved."""
        assert self.group_size is not None  # resolved by the constructor
        return self.group_size

    @property
    def squares_iterations(self) -> int:
        """Iterations of least squares, with the default resolved."""
        assert self.iterations is not None  # resolved by the constructor
        return self.iterations

    @property
    def mask_pattern(self) -> Pattern:
        """The pattern, parsed."""
        return Pattern.parse(self.pattern)

    @property
    def static_input(self) -> bool:
        """Whether activations have one scale per layer."""
        return self.activation == "static"

    @property
    def keeps_targets(self) -> bool:
        """Whether the hidden states of the dense model are needed beside those of the compressed one."""
        return self.refine > 0 or self.residual > 0

    @property
    def scale_dtype(self) -> torch.dtype:
        """What weight scales are stored in: bf16 where there are many of them, float32 where one serves a channel."""
        return torch.bfloat16 if get_scheme(self.scheme).grouped else torch.float32

    @property
    def needs_calibration(self) -> bool:
        """Whether any step looks at the inputs of a layer."""
        rounds_by_inputs = get_scheme(self.scheme).scaled and self.quantizer != "rtn"
        prunes_by_inputs = self.pruner in ("admm", "sparsegpt", "wanda")
        others = (
            self.squares_iterations > 0
            or self.refine > 0
            or self.curvature > 0
            or self.residual > 0
            or self.static_input
            or self.smooth > 0
            or bool(self.keep_dense)
        )
        return prunes_by_inputs or rounds_by_inputs or others

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values that a YAML recipe may hold."""
        return asdict(self) | {"ignore": list(self.ignore)}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return the options in YAML file ``path``: spelled like the attributes of ``Recipe``, or for llm-compressor."""
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{path}: cannot be read as a YAML recipe ({error})") from error
    if not isinstance(options, dict):
        raise OptionError(f"{path}: expected a mapping of options, such as 'scheme: w4a16'")
    return convert_recipe(options, str(path)) if is_llm_compressor(options) else options


def make_recipe(options: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Return the recipe with ``options``, checked for name and type; ``where`` (a file name) starts the messages.

    Raises:
        OptionError: an option is unknown, has the wrong type, or does not fit another one.
    """
    for name, value in options.items():
        if name not in _TYPES:
            raise OptionError(f"{where}: unknown option {name!r}, expected one of {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise OptionError(f"{where}: option {name} has the wrong type: {value!r}")
    try:
        return Recipe(**options)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"unknown {what} {value!r}: expected one of {', '.join(choices)}")
