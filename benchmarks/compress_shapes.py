"""How the seconds of compressing grow with blocks and with calibration tokens, on random weights of Llama's shapes.

    python -m benchmarks.compress_shapes -o benchmarks/results/<machine>/compress-llama-shapes.json

All runs are made in one process, one after another, after one that is not counted, which compiles kernels. One curve
goes over ``--blocks`` with ``--at-sequences``, the other one over ``--sequences`` with ``--at-blocks``.
``benchmarks.plot_compress`` draws them.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import vllm_sparse
from vllm_sparse.compress import compress

VOCABULARY = 1024  # the embedding is copied and not compressed
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip


def make_model(shapes: str, blocks: int, out: Path, device: torch.device) -> Path:
    """Write a model of random bf16 weights with the given shapes; return its directory."""
    config = LlamaConfig(
        num_hidden_layers=blocks, vocab_size=VOCABULARY, tie_word_embeddings=True, dtype="bfloat16", **SHAPES[shapes]
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(out)
    return out


class Bench:
    """The rows of one file."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.device = torch.device(args.device)
        self.rows: list[dict[str, Any]] = []

    def measure(self, blocks: int, sequences: int) -> dict[str, Any]:
        """Compress once; return the row."""
        args = self.args
        model = self.work / f"{args.shapes}-{blocks}"
        if not model.is_dir():
            make_model(args.shapes, blocks, model, self.device)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCABULARY, (sequences, args.length), generator=generator)
        out = self.work / "out"
        report = compress(
            model, out, calibration=tokens, device=self.device, scheme=args.scheme, force=True, quiet=True
        )
        row: dict[str, Any] = {"shapes": args.shapes, "blocks": blocks, "sequences": sequences, "length": args.length}
        row["seconds"] = round(report.seconds, 2)
        row["phases"] = {name: round(seconds, 2) for name, seconds in report.phases.items()}
        row["host_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
        if report.peak_device_bytes:
            row["device_gb"] = {name: round(held / 1e9, 2) for name, held in report.peak_device_bytes.items()}
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        return row

    def run(self) -> None:
        """Measure both curves."""
        args = self.args
        self.measure(1, min(args.sequences))
        curves = [(blocks, args.at_sequences) for blocks in args.blocks]
        curves += [(args.at_blocks, count) for count in args.sequences if (args.at_blocks, count) not in curves]
        for blocks, sequences in curves:
            self.rows.append(self.measure(blocks, sequences))
            self.write()

    def write(self) -> None:
        """Write what is known so far."""
        versions = {"vllm-sparse": vllm_sparse.__version__, "torch": torch.__version__}
        result = {
            "machine": self.args.machine,
            "date": date.today().isoformat(),
            "versions": versions | {"transformers": transformers.__version__},
            "model": f"random weights in the shapes of {self.args.shapes}",
            "threads": torch.get_num_threads(),
            "options": {"scheme": self.args.scheme},
            "rows": self.rows,
        }
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        self.args.output.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    cuda = torch.cuda.is_available()
    named = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--at-sequences", type=int, default=128)
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--at-blocks", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--machine", default=named)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        Bench(args, Path(work)).run()


if __name__ == "__main__":
    main()
