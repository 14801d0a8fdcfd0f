"""What a run that was cut short has finished: the blocks that need not be compressed again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vllm_sparse.compress.layer import LayerReport
from vllm_sparse.errors import FormatError, OutputError
from vllm_sparse.formats.checkpoint import Checkpoint, CheckpointWriter, read_json

_FILE = "manifest.json"


class Manifest:
    """The blocks in the partial directory of ``writer``, in order, each a shard on disk and the reports of its layers.

    Args:
        identity: everything that decides the bytes written. A directory begun with another identity is refused.

    Raises:
        OutputError: naming the first thing in which the earlier run differed.
    """

    def __init__(self, writer: CheckpointWriter, identity: Mapping[str, Any]) -> None:
        self._writer = writer
        self._path = writer.directory / _FILE
        self._identity = json.loads(json.dumps(identity))
        self._blocks: list[dict[str, Any]] = []
        if self._path.is_file():
            self._read()
        else:  # nothing that can be relied on
            shutil.rmtree(writer.directory)
            writer.directory.mkdir()
            self._write()

    def __len__(self) -> int:
        """How many blocks are finished."""
        return len(self._blocks)

    def tensors(self, block: int) -> dict[str, Tensor]:
        """Return what was written of a finished block, by name."""
        return load_file(self._shard(block))

    def layers(self, block: int) -> list[LayerReport]:
        """Return the reports of a finished block."""
        return [LayerReport(**layer) for layer in self._blocks[block]["layers"]]

    def add(self, layers: Sequence[LayerReport]) -> None:
        """Put a block on disk and note that it is finished. Whatever happens afterwards, it stays so."""
        shard = self._writer.flush()
        _sync(self._writer.directory / shard)
        self._blocks.append({"shard": shard, "layers": [asdict(layer) for layer in layers]})
        self._write()

    def remove(self) -> None:
        """Delete the file, which is no part of a finished model."""
        self._path.unlink()

    def _read(self) -> None:
        saved = read_json(self._path)
        begun = saved.get("identity")
        if not isinstance(begun, dict) or not isinstance(saved.get("blocks"), list):
            raise FormatError(f"{self._path}: not a manifest of blocks; delete {self._path.parent} to begin anew")
        for key in sorted(begun.keys() | self._identity.keys()):
            if begun.get(key) != self._identity.get(key):
                raise OutputError(
                    f"{self._path.parent}: was begun with {key} {begun.get(key)!r} and cannot be resumed with "
                    f"{self._identity.get(key)!r}; delete it to begin anew"
                )
        self._blocks = saved["blocks"]
        for block in range(len(self)):
            self._writer.adopt(self._shard(block).name)

    def _shard(self, block: int) -> Path:
        return self._writer.directory / str(self._blocks[block]["shard"])

    def _write(self) -> None:
        beside = self._path.with_suffix(".new")
        try:
            beside.write_text(json.dumps({"identity": self._identity, "blocks": self._blocks}), encoding="utf-8")
            _sync(beside)
            beside.replace(self._path)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written ({error})") from error


def source_fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of a checkpoint's config and of the name, place, shape, dtype and file size of every tensor."""
    told = [json.dumps(checkpoint.config, sort_keys=True)]
    told += [f"{name} {info.file} {info.shape} {info.dtype}" for name, info in sorted(checkpoint.tensors.items())]
    files = sorted({info.file for info in checkpoint.tensors.values()})
    told += [f"{file} {(stat := (checkpoint.path / file).stat()).st_size} {stat.st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _sync(path: Path) -> None:
    """Wait until ``path`` is on the disk and not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
