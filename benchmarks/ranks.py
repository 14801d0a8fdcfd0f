"""What one model says on one tensor-parallel rank and on two: vLLM's own methods beside this package's.

    python -m benchmarks.ranks CHECKPOINT PROMPTS.json -o benchmarks/results/<machine>/ranks-NAME.json

CHECKPOINT is a native one in w4a16; its weights are written again in every scheme, 2:4 for this package and dense for
vLLM, with the same values bit by bit. PROMPTS.json is a list of lists of token ids. Needs two GPUs.

Greedy tokens of two runs part at the first place where rounding decides, so that sequences are a coarse measure. The
fine one is ``apart``: how far the log-probabilities of the prompts' own tokens move, root mean square, in nats.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_sparse.compress.evaluate import load_dense
from vllm_sparse.formats import Sparse24Format
from vllm_sparse.formats.checkpoint import Checkpoint, CheckpointWriter
from vllm_sparse.formats.convert import convert, format_of, layers_of
from vllm_sparse.plugin.made_up import quantize_at_load
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight

NEW_TOKENS = 24
# Folder, vLLM's --quantization; "dense" is vLLM's own method for the checkpoint, "2:4" this package's.
CASES = [
    (f"{kind} {name}", f"{kind}/{name}", None, dtype)
    for name in ("bf16", "fp8", "fp8-static", "int8", "w4a16")
    for dtype in ("bfloat16", "float16")
    for kind in ("dense", "2:4")
    if (name, dtype) != ("int8", "float16")
] + [("dense --quantization fp8", "dense/bf16", "fp8", dtype) for dtype in ("bfloat16", "float16")]


def write_checkpoints(source: Path, prompts: list[list[int]], out: Path) -> None:
    """Write the weights of ``source`` as ``out/2:4/NAME`` and ``out/dense/NAME`` for every scheme."""
    with Checkpoint(source) as checkpoint:
        form, ignore = format_of(checkpoint), tuple(checkpoint.config["quantization_config"]["ignore"])
        weights: dict[str, Sparse24Weight] = {}
        others: dict[str, torch.Tensor] = {}
        for module, names in layers_of(checkpoint, form).items():
            tensors = {last: checkpoint.load(name) for last, name in names.items()}
            if "weight_packed" in tensors:
                weights[module] = form.to_weight(module, tensors)
            else:
                others |= {f"{module}.{last}": tensor for last, tensor in tensors.items()}
        config, files = checkpoint.config, list(checkpoint.other_files())
    for name in ("bf16", "fp8", "fp8-static", "int8", "w4a16"):
        scheme, static = SCHEMES[name.removesuffix("-static")], name.endswith("-static")
        made = {module: in_scheme(weight, scheme.name) for module, weight in weights.items()}
        if static:
            largest = largest_inputs(out / "dense" / "bf16", prompts, list(weights))
            made = {
                module: replace(weight, input_scale=torch.tensor([largest[module] / 448]))
                for module, weight in made.items()
            }
        group_size = next(iter(made.values())).group_size
        new = Sparse24Format(scheme, group_size=group_size, static_input=static, ignore=ignore)
        with CheckpointWriter(out / "2:4" / name) as writer:
            for module, weight in made.items():
                for last, tensor in new.from_weight(weight).items():
                    writer.add(f"{module}.{last}", tensor)
            for full_name, tensor in others.items():
                writer.add(full_name, tensor)
            for file in files:
                writer.copy(file)
            writer.write_json("config.json", {**config, "quantization_config": new.to_config()})
        convert(out / "2:4" / name, out / "dense" / name, to="dense")


def in_scheme(weight: Sparse24Weight, scheme: str) -> Sparse24Weight:
    """Return ``weight`` rounded to bf16 and from there to ``scheme``, with scales that bf16 holds; w4a16 as it is."""
    if weight.scheme.name == scheme:
        return weight
    made = Sparse24Weight.from_dense(weight.to_dense().bfloat16(), SCHEMES["bf16"])
    made = quantize_at_load(made, SCHEMES[scheme], "weight")
    return made if made.scales is None else replace(made, scales=made.scales.bfloat16().float())


def largest_inputs(path: Path, prompts: list[list[int]], modules: list[str]) -> dict[str, float]:
    """Return the largest absolute input of each layer over ``prompts``; layers that vLLM fuses share theirs."""
    model, largest = load_dense(path, torch.device("cpu")).float(), dict.fromkeys(modules, 0.0)

    def watch(name: str) -> Any:
        def hook(_: Any, arguments: Any) -> None:
            largest[name] = max(largest[name], float(arguments[0].abs().max()))

        return hook

    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for prompt in prompts:
            model(torch.tensor([prompt]))
    return largest


def generate(path: str, quantization: str | None, dtype: str, ranks: int, prompts: list[list[int]]) -> dict[str, Any]:
    """Return the greedy tokens, the five likeliest at each, and the log-probabilities of the prompts' own tokens."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        path, dtype=dtype, quantization=quantization, tensor_parallel_size=ranks, enforce_eager=True,
        enable_prefix_caching=False, max_model_len=128, max_num_seqs=len(prompts), max_num_batched_tokens=16384,
        gpu_memory_utilization=0.03, kv_cache_memory_bytes=1 << 28,
    )  # fmt: skip
    wanted = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=0)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    first, second = (llm.generate(given, wanted, use_tqdm=False) for _ in range(2))
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in first],
        "repeats": sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(first, second, strict=True)),
        "logprobs": [
            [{token: of.logprob for token, of in place.items()} for place in one.outputs[0].logprobs] for one in first
        ],
        "prompt": [
            place[token].logprob
            for one, prompt in zip(first, prompts, strict=True)
            for place, token in list(zip(one.prompt_logprobs, prompt, strict=True))[1:]
        ],
    }


def compare(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Return how far two results of ``generate`` agree; gaps are from the first's best token to the second's."""
    gaps, same16 = [], 0
    for i, (a, b) in enumerate(zip(one["tokens"], two["tokens"], strict=True)):
        parts = next((place for place, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if parts is None:
            same16 += i < 16
            continue
        known = one["logprobs"][i][parts]
        gaps.append(known[str(a[parts])] - known.get(str(b[parts]), min(known.values())))
    squares = [(a - b) ** 2 for a, b in zip(one["prompt"], two["prompt"], strict=True)]
    return {
        "same": len(one["tokens"]) - len(gaps), "of": len(one["tokens"]), "same16": same16,
        "gap": max(gaps, default=0.0), "apart": math.sqrt(sum(squares) / len(squares)),
        "repeats": [one["repeats"], two["repeats"]], "nll": [-sum(r["prompt"]) / len(r["prompt"]) for r in (one, two)],
    }  # fmt: skip


def run(work: Path, case: tuple[str, str, str | None, str], ranks: int, index: int, limit: int) -> dict[str, Any]:
    """Run ``generate`` in a process of its own, one rank on the first or second GPU in turn."""
    _, folder, quantization, dtype = case
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    out = work / f"{index}-{ranks}.json"
    # An engine in a process of its own begins with the prompts that have come so far, and how many tokens are in a step
    # decides how sums are split.
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[:2] if ranks == 2 else [visible[index % 2]])
    command = [sys.executable, "-m", "benchmarks.ranks", str(work / folder), str(work / "prompts.json"), "-o", str(out)]
    command += ["--dtype", dtype, "--ranks", str(ranks), *(["--quantization", quantization] if quantization else [])]
    done = subprocess.run(
        ["timeout", "-k", "5", str(limit), *command], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": f"{done.returncode}: {done.stderr[-1500:]}"}
    return json.loads(out.read_text())


def run_all(source: Path, prompts: list[list[int]], jobs: int, limit: int) -> Iterator[dict[str, Any]]:
    """Yield one row for each of ``CASES``, as soon as both of its engines have run."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        work = Path(folder)
        (work / "prompts.json").write_text(json.dumps(prompts))
        write_checkpoints(source, prompts, work)
        started = {
            (index, ranks): pool.submit(run, work, case, ranks, index, limit)
            for index, case in enumerate(CASES)
            for ranks in (1, 2)
        }
        for index, (name, _, _, dtype) in enumerate(CASES):
            one, two = (started[index, ranks].result() for ranks in (1, 2))
            error = one.get("error") or two.get("error")
            yield {"name": name, "dtype": dtype} | ({"error": error} if error else compare(one, two))


def to_line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    head = f"{row['name']:26}{row['dtype']:10}"
    if "error" in row:
        return f"{head}failed: {row['error'][-400:]}"
    return (
        f"{head}{row['same16']:2} of 16  {row['same']:3} of {row['of']}  gap {row['gap']:.3f}  "
        f"apart {row['apart']:.4f}  nll {row['nll'][0]:.4f} {row['nll'][1]:.4f}  repeats {row['repeats']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=8, help="engines at a time (default 8)")
    parser.add_argument("--limit", type=int, default=150, help="seconds for one engine (default 150)")
    for name, kind in (("--dtype", str), ("--ranks", int), ("--quantization", str)):
        parser.add_argument(name, type=kind, help="of one run, which this program starts by itself")
    args = parser.parse_args()
    prompts = json.loads(args.prompts.read_text())
    if args.ranks:
        result = generate(str(args.checkpoint), args.quantization, args.dtype, args.ranks, prompts)
        args.output.write_text(json.dumps(result))
        return
    result = {
        "machine": f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("vllm", "vllm-sparse", "torch")},
        "rows": [],
    }
    for row in run_all(args.checkpoint, prompts, args.jobs, args.limit):
        print(to_line(row), flush=True)
        result["rows"].append(row)
        args.output.write_text(json.dumps(result, indent=1) + "\n")  # what there is, should the time run out


if __name__ == "__main__":
    main()
