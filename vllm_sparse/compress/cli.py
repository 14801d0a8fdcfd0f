"""``vllm-sparse compress``: the options of ``compress`` on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import os

from vllm_sparse.compress.output import OUTPUTS
from vllm_sparse.compress.recipe import ACTIVATIONS, EMBEDDINGS, PRUNERS, QUANTIZERS, Recipe
from vllm_sparse.scheme import SCHEMES

_RECIPE_OPTIONS = tuple(field.name for field in dataclasses.fields(Recipe))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options. Those of the recipe default to None, so that a recipe file is only overruled where asked."""
    parser.add_argument("model", help="model directory or Hugging Face id")
    parser.add_argument("-o", "--output", required=True, help="directory to write")
    parser.add_argument("--scheme", help=f"{', '.join(SCHEMES)} (default w4a16)")
    parser.add_argument("--pattern", help="2:4, another N:M (N kept of every M), or the share of zeros (default 2:4)")
    parser.add_argument("--format", help=f"{', '.join(OUTPUTS)} (default sparse24); dense loads without this package")
    parser.add_argument("--activation", help=f"{', '.join(ACTIVATIONS)} scales for fp8 and int8 (default dynamic)")
    parser.add_argument("--smooth", type=float, help="strength of SmoothQuant, such as 0.5 (default 0, none)")
    parser.add_argument(
        "--keep-dense", help="rule:amount for layers to leave dense, such as owl:0.1 (of the weights) or kurtosis:5"
    )
    parser.add_argument("--embeddings", help=f"{', '.join(EMBEDDINGS)}: the table of token embeddings (default dense)")
    parser.add_argument("--pruner", help=f"{', '.join(PRUNERS)} (default admm)")
    parser.add_argument("--quantizer", help=f"{', '.join(QUANTIZERS)} (default gptq)")
    parser.add_argument(
        "--group-size", type=int, help="input features per scale, -1 per channel (default 128 for weight-only schemes)"
    )
    parser.add_argument("--iterations", type=int, help="of least squares on the kept weights (default 20; 0 for none)")
    parser.add_argument("--dampening", type=float, help="share of H's mean diagonal added to it (default 0.01)")
    parser.add_argument("--refine", type=int, help="training steps per block on the kept weights (default 0)")
    parser.add_argument("--generate", type=int, help="sequences that the dense model writes itself, added (default 0)")
    parser.add_argument(
        "--curvature",
        type=int,
        help="sequences to find what errors of a layer's outputs cost, all together (default 0)",
    )
    parser.add_argument(
        "--residual",
        type=float,
        help="share of what the residual stream lacks that layers which add to it make good, such as 0.5 (default 0)",
    )
    parser.add_argument("--ignore", nargs="+", help="layers that stay dense: names, or re: and a regular expression")
    parser.add_argument("--calibration", help="text file, directory, .jsonl file or Hugging Face dataset id")
    parser.add_argument("--num-samples", type=int, help="calibration sequences (default 128)")
    parser.add_argument("--seq-len", type=int, help="tokens per sequence (default 512)")
    parser.add_argument("--seed", type=int, help="of the choice of sequences (default 0)")
    parser.add_argument("--recipe", help="YAML file with these options; the command line wins")
    parser.add_argument("--device", help="such as cuda:0 or cpu (default: the first GPU, else the CPU)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print layers, bytes, memory and time, measured on one block; write nothing",
    )
    parser.add_argument("--force", action="store_true", help="replace what is in the output directory")
    parser.add_argument(
        "--resume", action="store_true", help="keep finished blocks when cut short, and begin after those kept before"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; errors a user can cause are raised as SparseError."""
    from vllm_sparse.compress.pipeline import compress, dry_run  # transformers takes seconds to import

    options = {name: getattr(args, name) for name in ("calibration", "device", "recipe", "force", *_RECIPE_OPTIONS)}
    if args.dry_run:
        print(dry_run(args.model, args.output, **options).to_text())
        return 0
    report = compress(args.model, args.output, resume=args.resume, **options)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several
        print(f"{report.summary()}\nwritten to {args.output}")
    return 0
