"""What the fuzzers share: one input is a config and a safetensors file, and what reading it may do.

A case is bytes: the length of the config in two bytes, the config's text, the safetensors file.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.formats.golden import CASES, FOLDER, config
from tests.formats.weights import random_weight
from vllm_sparse.errors import FormatError
from vllm_sparse.formats.checkpoint import Checkpoint
from vllm_sparse.formats.convert import Converter, format_of
from vllm_sparse.formats.embedding import quantize_table
from vllm_sparse.formats.sparse24 import Sparse24Format
from vllm_sparse.scheme import SCHEMES

CORPUS = Path(__file__).parent / "corpus"
MODULE = "a.q_proj"
# Reading makes at most two bytes of a bit (a bitmask without values), and scales per channel of a scalar.
_LARGEST_GROWTH = 64
ODD_TEXTS = (
    "", "x", "../x", "re:(", "re:.*", "Linear", "channel", "group", "tensor", "token", "int", "float", "2:4", "dense",
    "sparse24", "compressed-tensors", "gptq", "marlin_24", "marlin-24", "pack-quantized", "sparse-24-bitmask",
    "sparse-bitmask", "float-quantized", "fp8", "w4a16", "bfloat16", "static", "a\0b", "\ud800",
)  # fmt: skip
KEYS = (
    "quant_method", "version", "scheme", "format", "sparsity_config", "sparsity_structure", "config_groups", "group_0",
    "targets", "ignore", "weights", "input_activations", "num_bits", "type", "strategy", "group_size", "symmetric",
    "dynamic", "actorder", "bits", "checkpoint_format", "scale_dtype", "value_dtype", "activation", "desc_act", "sym",
    "int8_embeddings",
)  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 3, 4, 8, 32, 128, 1.5, 1 << 31, 1 << 63, 10**30, [], {}, [[]], ["Linear"], *ODD_TEXTS,
)  # fmt: skip
_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "I16", "I8", "U8", "BOOL", "F99", "C64", 3)
_SIZES = (-1, 0, 1, 2, 3, 4, 8, 16, 24, 64, 1 << 20, 1 << 32, 1 << 62, 1 << 64, 2.5, "4", None)


class _Kept:
    """Stands for a CheckpointWriter: keeps what is written, within the bounds of what was read."""

    def __init__(self, largest: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._room = largest

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._room -= tensor.nbytes
        assert self._room >= 0, "more was made than the file can hold"
        self.tensors[name] = tensor

    def write_json(self, name: str, value: Any) -> None:
        json.dumps(value)


def split(case: bytes) -> tuple[bytes, bytes]:
    """Return the config and the file of a case."""
    length = int.from_bytes(case[:2], "little")
    return case[2 : 2 + length], case[2 + length :]


def join(config_text: bytes, file: bytes) -> bytes:
    """Return the case of a config and a file."""
    return len(config_text).to_bytes(2, "little") + config_text + file


def run(case: bytes, folder: Path, ways: tuple[bool, ...] = (False, True)) -> bool:
    """Read a case, to the native format and to dense ones as ``ways`` says; return whether it is a checkpoint.

    Raises:
        AssertionError, or anything that is no FormatError: a bug.
    """
    config_text, file = split(case)
    for name, data in (("config.json", config_text), ("model.safetensors", file)):
        (folder / name).unlink(missing_ok=True)  # some file systems flush a file that is cut and written again
        (folder / name).write_bytes(data)
    read = [_read(folder, to_dense, len(file)) for to_dense in ways]
    return any(read)


def _read(folder: Path, to_dense: bool, size: int) -> bool:
    try:
        with Checkpoint(folder) as checkpoint:
            form = format_of(checkpoint)
            writer = _Kept(_LARGEST_GROWTH * (size + 64))
            Converter(checkpoint, form, writer, to_dense).run()  # type: ignore[arg-type]
    except FormatError as error:
        text = str(error)
        assert str(folder) in text, f"the error does not name the file: {text}"
        return False
    return True


def seeds() -> list[bytes]:
    """Return the smallest golden files of every format as cases."""
    cases = []
    for case in CASES:
        file = (FOLDER / f"{case.name}.safetensors").read_bytes()
        header, data = parse(file)
        header.pop("__metadata__", None)
        named = {f"{MODULE}.{name}": entry for name, entry in header.items()}
        text = json.dumps({"quantization_config": config(case)}, separators=(",", ":")).encode()
        cases.append(join(text, build(named, data)))
    return [*(case for case in cases if len(case) < 20000), _native_seed()]


def _native_seed() -> bytes:
    """Return a native checkpoint of one layer and an embedding table in 8 bits."""
    form = Sparse24Format(SCHEMES["fp8"], embeddings=("a.embed_tokens",))
    table = quantize_table(torch.arange(-32.0, 32.0).reshape(4, 16))
    tensors = {f"{MODULE}.{name}": t for name, t in form.from_weight(random_weight(form.scheme, 4, 16)).items()}
    tensors |= {f"a.embed_tokens.{name}": tensor for name, tensor in table.items()}
    return join(json.dumps({"quantization_config": form.to_config()}, separators=(",", ":")).encode(), save(tensors))


def parse(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def build(header: Any, data: bytes) -> bytes:
    """Return a safetensors file."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutate(case: bytes, random: random.Random) -> bytes:
    """Return ``case`` with one to three things changed, most often in a way that keeps the rest readable."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        config_text, file = split(case)
        try:
            kind = random.randrange(8)
            if kind < 2:
                config_text = _mutate_config(config_text, random)
            elif kind < 4:
                file = _mutate_header(file, random)
            elif kind < 6:
                header, data = parse(file)
                file = build(header, _mutate_bytes(data, random))
            else:
                file = _mutate_bytes(file, random)
        except (
            ValueError,
            struct.error,
            LookupError,
            AttributeError,
            TypeError,
        ):  # not readable any more: only bytes are left
            file = _mutate_bytes(file, random)
        case = join(config_text[:65535], file)
    return case


def _mutate_bytes(data: bytes, random: random.Random) -> bytes:
    kind = random.randrange(4)
    if kind == 0 or not data:
        return data[: random.randrange(len(data) + 1)]
    if kind == 1:
        return data + random.randbytes(random.choice((1, 8, 64)))
    changed = bytearray(data)
    for _ in range(random.choice((1, 2, 8))):
        at = random.randrange(len(changed))
        changed[at] = random.choice((0, 0x7F, 0x80, 0xFF, changed[at] ^ (1 << random.randrange(8))))
    return bytes(changed)


def _mutate_config(text: bytes, random: random.Random) -> bytes:
    value = json.loads(text)
    places = [(value, key) for key in value]
    for holder, key in places:
        below = holder[key]
        if isinstance(below, dict):
            places += [(below, inner) for inner in below]
        elif isinstance(below, list):
            places += [(below, inner) for inner in range(len(below))]
    holder, key = random.choice(places)
    kind = random.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(KEYS)] = random.choice(_ODD)
    else:
        holder[key] = random.choice(_ODD)
    return json.dumps(value, separators=(",", ":")).encode()


def _mutate_header(file: bytes, random: random.Random) -> bytes:
    header, data = parse(file)
    name = random.choice(sorted(header))
    entry = header[name]
    kind = random.randrange(9)
    if kind == 0:
        entry["dtype"] = random.choice(_DTYPES)
    elif kind == 1:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 2:
        total = 1
        for size in entry["shape"]:
            total *= size
        entry["shape"] = random.choice(([total], [1, total], [total, 1], [1, *entry["shape"]], [], [2, total // 2]))
    elif kind == 3:
        entry["shape"] = [random.choice((random.choice(_SIZES), size)) for size in entry["shape"]]
    elif kind == 4:
        entry["data_offsets"] = [random.choice((random.choice(_SIZES), offset)) for offset in entry["data_offsets"]]
    elif kind == 5:
        del header[name]
    elif kind == 6:
        other = random.choice((f"{MODULE}.bias", "lm_head.weight", "../../x", "", ".", "..weight", f"{name}.weight"))
        header[other] = header.pop(name)
    elif kind == 7:
        other = random.choice(sorted(header))
        header[name], header[other] = header[other], header[name]
    else:  # an entry that takes no data
        header[random.choice((f"{MODULE}.extra", "b.weight", f"{MODULE}.weight_shape"))] = {
            "dtype": "I64", "shape": [0, random.choice((4, 1 << 40))], "data_offsets": [0, 0],
        }  # fmt: skip
    return build(header, data)
