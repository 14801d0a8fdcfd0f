"""The command ``vllm-sparse``: one subcommand a module, imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from vllm_sparse import __version__
from vllm_sparse.errors import SparseError

COMMANDS = {
    "compress": ("vllm_sparse.compress.cli", "make a 2:4 checkpoint from a Hugging Face causal LM"),
    "convert": ("vllm_sparse.formats.convert", "turn any 2:4 checkpoint into the native format, or into a dense one"),
    "bench": ("vllm_sparse.bench.cli", "measure models side by side: latency, throughput, serving, accuracy"),
    "serve": ("vllm_sparse.serve", "serve a model with vLLM: the same as 'vllm serve'"),
    "inspect": ("vllm_sparse.inspect", "show what is in a checkpoint and which kernels would run it here"),
    "doctor": ("vllm_sparse.doctor", "show versions, hardware and what was built"),
}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: vllm-sparse COMMAND …", "", *lines, "", "'vllm-sparse COMMAND --help' tells more."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (2: a wrong call or input, 130: interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in {"-h", "--help"}:
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"vllm-sparse: error: unknown command {argv[0]!r}\n\n{_overview()}", file=sys.stderr)
        return 2
    if argv[0] == "compress":
        # Read when torch is imported. Threads that spin while they wait for each other take several times as long
        # wherever another program wants a core too, and gain little where none does.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    module_name, what = COMMANDS[argv[0]]
    try:
        module = importlib.import_module(module_name)
        parser = argparse.ArgumentParser(prog=f"vllm-sparse {argv[0]}", description=what)
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(argv[1:])))
    except SparseError as error:
        print(f"vllm-sparse: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vllm-sparse: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
