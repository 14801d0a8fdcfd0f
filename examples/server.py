"""Start vLLM's OpenAI-compatible server in a process of its own, wait for it, and stop it again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


class ServerError(RuntimeError):
    """The server ended, or did not answer in time; the message holds the end of its log."""


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    what = "ended" if process.poll() is not None else f"did not answer within {seconds:.0f} s"
    raise ServerError(f"the server {what}; the end of {log}:\n{tail}")


@contextmanager
def serve(model: Path | str, log: Path, options: Sequence[str] = (), seconds: float = 400) -> Iterator[str]:
    """Serve ``model`` and yield the server's base URL; its output goes to ``log``."""
    port = free_port()
    command = [sys.executable, "-m", "vllm_sparse.cli", "serve", str(model), "--host", "127.0.0.1"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | dict(os.environ)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process, log, seconds)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
