"""What is benchmarked: models by path or hub id, running servers by URL, and shapes without weights."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_sparse.errors import OptionError
from vllm_sparse.formats.sparse24 import Sparse24Format
from vllm_sparse.scheme import SCHEMES

GROUP_SIZE = 128
_LABEL = re.compile(r"([A-Za-z0-9][\w.+-]*)=(.+)")
_IGNORE = ("lm_head",)


@dataclass(frozen=True)
class Target:
    """One row of the report.

    Attributes:
        label: its name in tables, plots and file names.
        source: a model directory, a hub id, or the base URL of a running server.
        options: vLLM arguments of this model alone, on top of those that all models share.
        dummy: its weights are random.
    """

    label: str
    source: str
    options: tuple[str, ...] = ()
    dummy: bool = False

    @property
    def is_endpoint(self) -> bool:
        """Whether somebody else's server is measured."""
        return self.source.startswith(("http://", "https://"))

    def to_json(self) -> dict[str, Any]:
        """Return what the results keep of it."""
        return asdict(self) | {"options": list(self.options)}


def parse_targets(models: Sequence[str], model_args: Sequence[str]) -> list[Target]:
    """Read ``[LABEL=]MODEL`` and ``LABEL=ARGS``; labels default to the last part of the model's path.

    Raises:
        OptionError: two models have one label, or arguments belong to none of them.
    """
    options = {}
    for entry in model_args:
        match = _LABEL.fullmatch(entry)
        if match is None:
            raise OptionError(f"--model-args {entry!r}: expected LABEL=ARGUMENTS")
        options[match[1]] = tuple(shlex.split(match[2]))
    targets: dict[str, Target] = {}
    for model in models:
        match = _LABEL.fullmatch(model)
        label, source = (match[1], match[2]) if match else (_label(model), model)
        if label in targets:
            raise OptionError(f"two models are called {label!r}: name them as LABEL=MODEL")
        targets[label] = Target(label, source.rstrip("/"), options.pop(label, ()))
    if options:
        raise OptionError(f"--model-args: no model is called {next(iter(options))!r}")
    return list(targets.values())


def _label(model: str) -> str:
    if model.startswith(("http://", "https://")):
        return model.split("//", 1)[1].strip("/").replace("/", "-").replace(":", "-")
    return Path(model.rstrip("/")).name


def _dense_quantization(bits: int, kind: str, activations: Mapping[str, Any] | None) -> dict[str, Any]:
    grouped = {"strategy": "group", "group_size": GROUP_SIZE} if bits == 4 else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False} | grouped
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "float" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(_IGNORE),
    }


def dummy_variants() -> dict[str, dict[str, Any] | None]:
    """Return the ``quantization_config`` of every variant of a model without weights, dense ones first."""
    token = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    variants: dict[str, dict[str, Any] | None] = {
        "bf16": None,
        "fp8": _dense_quantization(8, "float", token),
        "w4a16": _dense_quantization(4, "int", None),
    }
    for scheme in SCHEMES.values():
        form = Sparse24Format(scheme, group_size=GROUP_SIZE if scheme.grouped else -1, ignore=_IGNORE)
        variants[f"sparse24-{scheme.name}"] = form.to_config()
    return variants


def dummy_targets(config: Path, variants: Sequence[str], out: Path) -> list[Target]:
    """Write one model directory per variant below ``out``: the config, and a tokenizer of made-up words.

    Raises:
        OptionError: ``config`` is no model config, or a variant does not exist.
    """
    file = config / "config.json" if config.is_dir() else config
    try:
        shape = json.loads(file.read_text(encoding="utf-8"))
        vocab_size = int(shape["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"--dummy {config}: not the config.json of a language model ({error})") from error
    known = dummy_variants()
    if unknown := [name for name in variants if name not in known]:
        raise OptionError(f"unknown variant {unknown[0]!r}: expected one of {', '.join(known)}")
    shape.pop("quantization_config", None)
    targets = []
    for name in variants or known:
        directory = out / name
        directory.mkdir(parents=True, exist_ok=True)
        quantization = known[name]
        data = shape | ({"quantization_config": quantization} if quantization else {})
        (directory / "config.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
        _write_tokenizer(directory, vocab_size)
        targets.append(Target(name, str(directory), ("--load-format", "dummy"), dummy=True))
    return targets


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (directory / "tokenizer.json").exists():
        return
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(directory)
