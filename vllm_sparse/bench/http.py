"""The few requests this package makes to an OpenAI-compatible server, and what can be wrong with one, in words."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from vllm_sparse.errors import EngineError

_FULL = (429, 503)


def request(label: str, url: str, body: Mapping[str, Any] | None = None, seconds: float = 300) -> Any:
    """GET ``url``, or POST ``body`` to it as JSON; return the answer's JSON, None if it has none.

    Raises:
        EngineError: nobody answers, the queue is full (HTTP 429, 503), or the server refuses the request.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=seconds) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()[:300]
        if error.code in _FULL:
            raise EngineError(f"{label}: the queue of {url} is full (HTTP {error.code}): {said}") from error
        raise EngineError(f"{label}: {url} refused the request (HTTP {error.code}): {said}") from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise EngineError(f"{label}: {url} does not answer: {reason}") from error
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise EngineError(f"{label}: {url} answered something that is not JSON: {text[:80]!r}") from error
