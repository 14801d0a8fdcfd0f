"""The results of one run, in one JSON file that is whole at every moment and can be continued."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_sparse.errors import OptionError, OutputError

SCHEMA = "vllm-sparse-bench/1"
FILE = "bench.json"
Row = dict[str, Any]
_SAME = ("machine", "versions", "commit", "arguments", "targets")


class Store:
    """``DIR/bench.json``: the header that makes rows comparable, the rows, and what failed.

    Args:
        out: the directory, made if need be.
        header: machine, versions, commit, arguments and targets of this run.
        resume: continue a run that is there already.

    Raises:
        OutputError: a run is there and ``resume`` is not given, or the directory cannot be written.
        OptionError: the run that is there was made elsewhere or otherwise, so that its rows do not compare.
    """

    def __init__(self, out: Path, header: Mapping[str, Any], resume: bool = False) -> None:
        self.path = out / FILE
        self.data: dict[str, Any] = {"schema": SCHEMA, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.data |= {**header, "warnings": [], "rows": [], "failures": []}
        if self.path.exists():
            self._continue(header, resume)
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.save()
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from error

    def _continue(self, header: Mapping[str, Any], resume: bool) -> None:
        if not resume:
            raise OutputError(f"{self.path} holds a run: give another -o, or --resume to go on with it")
        there = load(self.path)
        for key in _SAME:
            if there.get(key) != json.loads(json.dumps(header[key])):
                raise OptionError(
                    f"{self.path}: cannot go on with this run, its {key} are not the same; numbers of different "
                    f"machines, versions or arguments are never compared"
                )
        self.data = there | {"failures": []}

    def save(self) -> None:
        """Write the file beside itself and rename it."""
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.data, indent=1), encoding="utf-8")
        os.replace(beside, self.path)

    def has(self, key: Mapping[str, Any]) -> bool:
        """Return whether a row with all of ``key``'s values is there."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.data["rows"])

    def find(self, key: Mapping[str, Any]) -> list[Row]:
        """Return the rows with all of ``key``'s values."""
        return [row for row in self.data["rows"] if all(row.get(name) == value for name, value in key.items())]

    def add(self, row: Row) -> None:
        """Keep a result."""
        self.data["rows"].append(row)
        self.save()

    def fail(self, key: Mapping[str, Any], error: Exception) -> None:
        """Keep what failed, and why."""
        self.data["failures"].append({**key, "error": str(error)})
        self.save()

    def warn(self, sentence: str) -> None:
        """Keep a warning, once."""
        if sentence not in self.data["warnings"]:
            self.data["warnings"].append(sentence)
            self.save()


def load(path: Path) -> dict[str, Any]:
    """Return the content of a results file.

    Raises:
        OptionError: it is no such file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: not a results file ({error})") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise OptionError(f"{path}: not a results file of {SCHEMA}")
    return data
