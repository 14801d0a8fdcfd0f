"""A Hugging Face checkpoint directory, read without loading it and written without ever leaving half of one."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_sparse.errors import FormatError, OutputError

_SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 1 << 26  # parsed it takes many times as much; the index of 200,000 tensors has 20 MB
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in ``path``; raise FormatError naming the file when there is none."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise FormatError(f"{path}: {path.stat().st_size} bytes are too many for a JSON file of a model")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, a number too long
        raise FormatError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return value


class Checkpoint:
    """The tensors and files of a model directory. Headers are read and checked at once, data on demand through mmap.

    Use as a context manager, or call ``close``.

    Attributes:
        path: the directory.
        config: the parsed config.json.
        tensors: ``TensorInfo`` by tensor name.

    Raises:
        FormatError: no such directory, no config.json, no safetensors, a shard that is missing, truncated or corrupt,
            or an index that disagrees with the shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FormatError(f"{self.path}: no such model directory")
        if not (self.path / "config.json").is_file():
            raise FormatError(f"{self.path}: not a model directory, config.json is missing")
        self.config = read_json(self.path / "config.json")
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read_headers()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit dtype of the model, as its config has it: float16, or bfloat16 for any other."""
        name = self.config.get("dtype") or self.config.get("torch_dtype")
        return torch.float16 if name == "float16" else torch.bfloat16

    def load(self, name: str) -> Tensor:
        """Return tensor ``name``, on the CPU."""
        if name not in self.tensors:
            raise FormatError(f"{self.path}: there is no tensor {name}")
        return self._files[self.tensors[name].file].get_tensor(name)

    def other_files(self) -> Iterator[Path]:
        """Yield what belongs to the model besides weights and config: tokenizer, generation config, licence."""
        for file in sorted(self.path.iterdir()):
            if file.is_file() and file.suffix not in {".safetensors", ".bin", ".pt", ".pth", ".gguf"}:
                if file.name not in {"config.json", INDEX, "pytorch_model.bin.index.json"}:
                    yield file

    def close(self) -> None:
        """Close the shards."""
        self._stack.close()

    def _read_headers(self) -> None:
        index = self._index()
        for file in index:
            self._open(file)
        for file, names in index.items():
            for name in names:
                if name not in self.tensors or self.tensors[name].file != file:
                    raise FormatError(f"{self.path / file}: tensor {name!r} is in the index but not in the file")

    def _index(self) -> dict[str, list[str]]:
        if not (self.path / INDEX).is_file():
            files = sorted(file.name for file in self.path.glob("*.safetensors"))
            if not files:
                raise FormatError(f"{self.path}: no .safetensors file in the model directory")
            # Beside it there may be the same weights in the layout of their authors, such as consolidated.safetensors.
            return {file: [] for file in files if file == _SINGLE or _SINGLE not in files}
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{self.path / INDEX}: there is no weight_map")
        files_of: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise FormatError(f"{self.path / INDEX}: {name} is said to be in {file!r}, which is no file name")
            files_of.setdefault(file, []).append(name)
        return files_of

    def _open(self, file: str) -> None:
        if not (self.path / file).is_file():
            raise FormatError(f"{self.path / file}: the shard is missing")
        try:
            handle = self._stack.enter_context(safe_open(self.path / file, framework="pt"))
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                view = handle.get_slice(name)
                if name in self.tensors:
                    raise FormatError(f"{self.path / file}: tensor {name!r} is in {self.tensors[name].file} as well")
                if view.get_dtype() not in _DTYPES:
                    raise FormatError(f"{self.path / file}: tensor {name!r} has unsupported dtype {view.get_dtype()}")
                self.tensors[name] = TensorInfo(tuple(view.get_shape()), _DTYPES[view.get_dtype()], file)
        except FormatError:
            raise
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            raise FormatError(f"{self.path / file}: truncated or not a safetensors file ({error})") from error
        self._files[file] = handle


class CheckpointWriter:
    """Writes a model directory beside its final place and renames it there when it is complete.

    Use as a context manager; leaving it by an exception (or SIGTERM) removes what was written.

    Args:
        out: final directory. Must not exist or be empty unless ``force``, which replaces it at the end.
        shard_bytes: largest size of one shard.
        keep: leave what was written in place when the run is cut short, under a name that the next run finds again.
    """

    def __init__(self, out: str | Path, force: bool = False, shard_bytes: int = 5 << 30, keep: bool = False) -> None:
        self.out = Path(os.path.abspath(out))
        self._force = force
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0
        if not self.out.name:
            raise OutputError(f"{self.out}: is not a directory that can be replaced")
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out}: exists and is not a directory")
        if self.out.is_dir() and any(self.out.iterdir()) and not force:
            raise OutputError(f"{self.out}: the output directory is not empty; use --force to replace it")
        self._keep = keep
        self.directory = self.out.with_name(f".{self.out.name}.partial" + ("" if keep else f"-{os.getpid()}"))
        self._umask = os.umask(0o022)  # it can be read only by setting it
        os.umask(self._umask)

    def __enter__(self) -> CheckpointWriter:
        with _named_output_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=self._keep)
        self._old_sigterm = _raise_on_sigterm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if not self._keep:
                shutil.rmtree(self.directory, ignore_errors=True)
            if self._old_sigterm is not None:
                signal.signal(signal.SIGTERM, self._old_sigterm)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; it is on disk as soon as its shard is full."""
        if self._pending_bytes and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self.flush()
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a view would keep all of its storage in memory until the shard is written
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    @property
    def total_bytes(self) -> int:
        """Size of all tensors added so far."""
        return self._total_bytes + self._pending_bytes

    @property
    def names(self) -> set[str]:
        """Names of all tensors added so far."""
        return set(self._pending).union(*(names for _, names in self._shards))

    def adopt(self, file: str) -> None:
        """Count a shard that an earlier run left in ``directory`` as written.

        Raises:
            FormatError: it is not there, or truncated.
        """
        path = self.directory / file
        try:
            with safe_open(path, framework="pt") as shard:
                names = list(shard.keys())
                self._total_bytes += sum(shard.get_tensor(name).nbytes for name in names)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: missing, truncated or not a safetensors file ({error})") from error
        self._shards.append((path, names))

    def write_text(self, name: str, text: str) -> None:
        """Write a small file into the directory."""
        with _named_output_errors(self.directory / name):
            (self.directory / name).write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file into the directory."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def copy(self, file: Path) -> None:
        """Copy ``file`` into the directory."""
        with _named_output_errors(self.directory / file.name):
            shutil.copyfile(file, self.directory / file.name)

    def flush(self) -> str:
        """Put every tensor added so far on disk, in a shard of ``directory``; return the name of the last shard."""
        if self._shards and not self._pending:
            return self._shards[-1][0].name
        path = self.directory / f"shard-{len(self._shards):05d}.safetensors"
        with _named_output_errors(path):
            save_file(_unshared(self._pending), path, metadata={"format": "pt"})
            path.chmod(0o666 & ~self._umask)  # safetensors creates files that only their owner can read
        self._shards.append((path, list(self._pending)))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
        return path.name

    def _finish(self) -> None:
        self.flush()
        weight_map = {}
        for number, (path, names) in enumerate(self._shards, 1):
            file = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            file = file if len(self._shards) > 1 else "model.safetensors"
            with _named_output_errors(self.directory / file):
                path.rename(self.directory / file)
            weight_map.update(dict.fromkeys(names, file))
        if len(self._shards) > 1:
            self.write_json(
                INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            )
        with _named_output_errors(self.out):
            self._replace()

    def _replace(self) -> None:
        old = self.out.with_name(f".{self.out.name}.old-{os.getpid()}")
        if self.out.is_dir() and any(self.out.iterdir()):
            self.out.rename(old)
        try:
            self.directory.rename(self.out)
        except OSError:
            if old.exists():
                old.rename(self.out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` with copies of those that share memory, as tied weights do; safetensors refuses them."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        address = tensor.data_ptr()
        unshared[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return unshared


class _named_output_errors:
    """Turn what the system says of a failed write into one sentence that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (OSError, SafetensorError)):
            raise OutputError(f"{self._path}: cannot be written ({error}); nothing was left behind") from error


def _raise_on_sigterm() -> Any:
    """Make SIGTERM unwind like Ctrl-C, so that partial output is removed; return the handler to put back."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: the caller owns the signals
        return None
