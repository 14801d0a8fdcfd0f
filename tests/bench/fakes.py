"""Stand-ins for vLLM, run as scripts: an engine, a client and a server with the same lines, files and answers."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

QUEUE = {"max": 10**9}


class Handler(BaseHTTPRequestHandler):
    """Tokens are characters; every token of a prompt has log-probability -ln 2, halved for a model called sparse."""

    def log_message(self, *words):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/v1/models":
            return self.answer(200, {"data": [{"id": "model", "root": "/tokenizer"}]})
        return self.answer(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.answer(200, {"tokens": [ord(letter) for letter in body["prompt"]]})
        if body.get("prompt") == "die":
            os._exit(9)
        QUEUE["max"] -= 1
        if QUEUE["max"] < 0:
            return self.answer(503, {"error": "too many requests are waiting"})
        logprobs = [None] + [{str(token): {"logprob": -0.5}} for token in body["prompt"][1:]]
        return self.answer(200, {"choices": [{"text": "x", "prompt_logprobs": logprobs}]})


def serve(arguments):
    """``server MODEL --port N …``: a model directory may hold a file ``behaviour`` with what it does wrong."""
    behaviour = Path(arguments[0]) / "behaviour"
    told = json.loads(behaviour.read_text()) if behaviour.exists() else {}
    if told.get("load") == "fail":
        print("(EngineCore pid=7) ERROR [core.py:1] ValueError: model.layers.0 has no weight")
        print("RuntimeError: Engine core initialization failed. See root cause above.")
        sys.exit(1)
    QUEUE["max"] = told.get("queue", QUEUE["max"])
    port = int(arguments[arguments.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def answers():
    """Return the function that writes an answer to the process that started this one."""
    file = os.fdopen(int(os.environ["VLLM_SPARSE_BENCH_FD"]), "w")

    def send(answer):
        file.write(json.dumps(answer) + "\n")
        file.flush()

    return send


def engine(arguments):
    """An engine whose requests take 1 ms per output token, 0.5 ms for a model called sparse."""
    model = Path(arguments[arguments.index("--model") + 1])
    send = answers()
    if model.name == "broken":
        print("ValueError: model.layers.0 has no weight")
        sys.exit(1)
    send({"load_seconds": 1.0, "weight_bytes": 2_000_000 if model.name == "dense" else 500_000, "kv_tokens": 4096})
    for number, line in enumerate(sys.stdin):
        job = json.loads(line)
        if model.name == "fragile" and number == 5:
            os.kill(os.getpid(), 9)
        seconds = job["output"] * (1e-3 if model.name == "dense" else 5e-4)
        send({"seconds": seconds, "tokens": job["output"] * job["requests"]})


def post(url, body):
    """Return None, or what went wrong."""
    headers = {"Content-Type": "application/json"}
    try:
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=10).read()
    except Exception as error:
        return f"Traceback\n{error}"
    return ""


def client(arguments):
    """vLLM's client: it asks the server once per request, and takes its times from the rate it was given."""
    send = answers()
    send({"ready": True})
    for line in sys.stdin:
        words = json.loads(line)["arguments"]
        given = {name: words[words.index(name) + 1] for name in ("--base-url", "--num-prompts", "--request-rate")}
        count, prompt = int(given["--num-prompts"]), os.environ.get("FAKE_PROMPT", "ab")
        errors = [post(f"{given['--base-url']}/v1/completions", {"prompt": prompt}) for _ in range(count)]
        good = [not error for error in errors]
        rate, capacity = float(given["--request-rate"]), 10.0
        duration = count / min(rate, capacity)
        result = {"completed": sum(good), "duration": duration, "request_throughput": sum(good) / duration}
        result |= {"output_throughput": 1.0, "errors": errors, "ttfts": [0.01] * count, "itls": [[0.002] * 2] * count}
        for metric in ("ttft", "itl", "tpot", "e2el"):
            result |= {f"{key}_{metric}_ms": 2.0 + min(rate, 20.0) for key in ("mean", "p50", "p99")}
        send(result)


if __name__ == "__main__":
    {"server": serve, "engine": engine, "client": client}[sys.argv[1]](sys.argv[2:])
