"""Subprocesses: how they are started, what they answer, why they ended, and that nothing of them is left."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_sparse.errors import EngineError

RESULT_FD = "VLLM_SPARSE_BENCH_FD"  # the environment variable with the file descriptor answers go to
_ERROR = re.compile(r"((?:\w+\.)*\w*(?:Error|Exception|ExceptionGroup): .+|Value error, .+)")
_CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "EngineCore encountered an issue")


def last_error(log: Path) -> str:
    """Return the last error line of a log that is a cause and not a consequence; its last line if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    found = [match[1] for line in lines if (match := _ERROR.search(line))]
    causes = [text for text in found if not any(known in text for known in _CONSEQUENCES)]
    text = (causes or found or [line for line in lines if line.strip()] or ["it said nothing"])[-1]
    return text.strip()[:400]


def ending(process: subprocess.Popen[bytes]) -> str:
    """Return how a process that ended did so, in words."""
    status = process.returncode
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str] = {}, **more: Any
) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, its output going to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    defaults = {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=defaults | dict(os.environ) | dict(environment),
            start_new_session=True,
            **more,
        )


def stop(process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    """Ask a process to end, wait, and kill what is left of its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Worker:
    """A subprocess that answers: one JSON line in, one JSON line out, everything else in a log.

    Args:
        label: what errors call it.
        command: what is run; its first answer says that it is ready.
        log: where its output goes.
    """

    def __init__(self, label: str, command: Sequence[str], log: Path) -> None:
        self.label, self.log = label, log
        self._answers, write_end = os.pipe()
        self._buffer = b""
        self._loaded = False
        try:
            self.process = start(
                command,
                log,
                {RESULT_FD: str(write_end), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
                stdin=subprocess.PIPE,
                pass_fds=(write_end,),
            )
        finally:
            os.close(write_end)

    def wait_ready(self, seconds: float) -> dict[str, Any]:
        """Return the first answer.

        Raises:
            EngineError: the process ended or did not answer within ``seconds``.
        """
        answer = self._read(seconds)
        self._loaded = True
        return answer

    def ask(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a job and return its answer.

        Raises:
            EngineError: the process ended, failed at the job, or did not answer within ``seconds``.
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        answer = self._read(seconds)
        if error := answer.get("error"):
            raise EngineError(f"{self.label}: {error}; see {self.log}")
        return answer

    def _read(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            # The process is polled, since a child of it may hold the pipe open after its end.
            if select.select([self._answers], [], [], 0.2)[0]:
                data = os.read(self._answers, 1 << 16)
                self._buffer += data
                if data:
                    continue
            if self.process.poll() is not None:
                when = "while it measured" if self._loaded else "while loading"
                raise EngineError(
                    f"{self.label}: the engine {ending(self.process)} {when}: {last_error(self.log)}; see {self.log}"
                )
            if time.monotonic() > deadline:
                raise EngineError(f"{self.label}: the engine did not answer within {seconds:.0f} s; see {self.log}")
        line, self._buffer = self._buffer.split(b"\n", 1)
        return dict(json.loads(line))

    def finish(self) -> None:
        """Tell the process that there are no more jobs."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()

    def close(self) -> None:
        """End the process and everything it started."""
        self.finish()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        stop(self.process)
        os.close(self._answers)


class Answers:
    """The other end: what a worker module writes its answers with."""

    def __init__(self) -> None:
        descriptor = int(os.environ[RESULT_FD])
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")

    def send(self, answer: Mapping[str, Any]) -> None:
        """Write one answer; numbers of other libraries become plain ones."""
        self._file.write(json.dumps(answer, default=float) + "\n")
        self._file.flush()
