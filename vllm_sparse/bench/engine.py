"""Run as ``python -m``: one vLLM engine in a process of its own, that times batches of random prompts."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import TokensPrompt
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_sparse.bench.memory import model_bytes
from vllm_sparse.bench.process import Answers


def memory(llm: Any) -> dict[str, Any]:
    """Return the bytes of the weights and the number of tokens that the KV cache holds."""
    try:
        weights = sum(llm.apply_model(model_bytes))
    except Exception as error:  # a figure that a vLLM version does not give must not end a benchmark
        print(f"weight bytes not known: {error!r}", flush=True)
        weights = None
    cache = llm.llm_engine.vllm_config.cache_config
    blocks = getattr(cache, "num_gpu_blocks", None)
    return {"weight_bytes": weights, "kv_tokens": blocks * cache.block_size if blocks else None}


def run(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Generate exactly ``output`` tokens for ``requests`` random prompts at once; return seconds and tokens."""
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    shape = (job["requests"], job["prompt"])
    prompts = np.random.default_rng(job["seed"]).integers(min(vocabulary, 10_000), size=shape).tolist()
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=job["output"], detokenize=False)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    begin = time.perf_counter()
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}


def main() -> None:
    """Load the model that the command line names, then answer jobs until the input ends."""
    answers = Answers()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    begin = time.perf_counter()
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args()))
    answers.send({"load_seconds": time.perf_counter() - begin} | memory(llm))
    for line in sys.stdin:
        try:
            answers.send(run(llm, json.loads(line)))
        except ValueError as error:  # what vLLM says of a request that it refuses
            answers.send({"error": str(error)})


if __name__ == "__main__":
    main()
