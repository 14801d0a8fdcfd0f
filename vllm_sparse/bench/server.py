"""A model behind an OpenAI-compatible server: one we start and stop, or one that somebody runs."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from vllm_sparse.bench.http import request
from vllm_sparse.bench.process import ending, last_error, start, stop
from vllm_sparse.bench.targets import Target
from vllm_sparse.errors import EngineError

SERVED_NAME = "model"
COMMAND = (sys.executable, "-m", "vllm_sparse.cli", "serve")


@dataclass
class Server:
    """A server that answers.

    Attributes:
        label: whose model it serves.
        url: its base URL, without ``/v1``.
        model: the name requests have to give.
        tokenizer: path or hub id of the tokenizer.
        process: what we started, None for somebody else's server.
    """

    label: str
    url: str
    model: str
    tokenizer: str
    log: Path | None = None
    process: Popen[bytes] | None = None

    def check(self) -> None:
        """Raise EngineError if it no longer answers."""
        if self.process is not None and self.process.poll() is not None:
            assert self.log is not None
            raise EngineError(
                f"{self.label}: the server {ending(self.process)} while it was measured: "
                f"{last_error(self.log)}; see {self.log}"
            )
        request(self.label, f"{self.url}/health", seconds=30)


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: Server, seconds: float) -> None:
    assert server.process is not None
    deadline = time.monotonic() + seconds
    while server.process.poll() is None:
        try:
            request(server.label, f"{server.url}/health", seconds=5)
            return
        except EngineError:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{server.label}: the server did not answer within {seconds:.0f} s; see {server.log}"
                ) from None
            time.sleep(0.3)
    assert server.log is not None
    raise EngineError(
        f"{server.label}: the model does not load, the server {ending(server.process)}: "
        f"{last_error(server.log)}; see {server.log}"
    )


def connect(target: Target) -> Server:
    """Return somebody else's running server.

    Raises:
        EngineError: it does not answer, or serves no model.
    """
    models = request(target.label, f"{target.source}/v1/models", seconds=30)
    try:
        first = models["data"][0]
        return Server(target.label, target.source, first["id"], first.get("root") or first["id"])
    except (TypeError, KeyError, IndexError) as error:
        raise EngineError(f"{target.label}: {target.source}/v1/models names no model") from error


@contextmanager
def serving(target: Target, options: Sequence[str], log: Path, seconds: float) -> Iterator[Server]:
    """Serve ``target`` with vLLM (or connect to it, if it is a server already) and stop it again.

    Raises:
        EngineError: the model does not load within ``seconds``, or the endpoint does not answer.
    """
    if target.is_endpoint:
        yield connect(target)
        return
    port = free_port()
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME]
    process = start([*COMMAND, target.source, *where, *options], log)
    try:
        server = Server(target.label, f"http://127.0.0.1:{port}", SERVED_NAME, target.source, log, process)
        _wait_until_healthy(server, seconds)
        yield server
    finally:
        stop(process)
