"""Run as ``python -m``: vLLM's own ``bench serve`` client, also where the command ``vllm`` is broken; imported once."""

from __future__ import annotations

import json
import sys

from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_sparse.bench.process import Answers

_UNUSED = ("generated_texts", "input_lens", "start_times")  # large, and nothing is made of them


def main() -> None:
    """Run ``bench serve`` with the arguments of each job until the input ends."""
    answers = Answers()
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    answers.send({"ready": True})
    for line in sys.stdin:
        arguments = json.loads(line)["arguments"]
        try:
            result = bench_serve(parser.parse_args(arguments))
        except Exception as error:  # whatever it is, it is told to the process that asked
            answers.send({"error": f"vLLM's benchmark client failed: {error}"})
        else:
            answers.send({key: value for key, value in result.items() if key not in _UNUSED})


if __name__ == "__main__":
    main()
