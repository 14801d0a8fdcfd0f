"""Accuracy of 2:4 models against llm-compressor's, on the same calibration and evaluation tokens.

    python benchmarks/accuracy.py MODEL --rival ENV -o benchmarks/results/<machine>/accuracy-NAME.json

Text is this interpreter's own standard library, or the one in --text (another release of Python has other tokens),
split by file into calibration (three quarters) and evaluation, so that no file is in both. ENV is the rival's own
virtual environment, made with pip where there is none; without --rival its rows are left out. Models that are already
in --work are evaluated again and not made again, so a run that was cut short goes on. R = (rival - ours) / (rival -
dense) in negative log likelihood: 0 is as good as the rival and 1 as good as the dense model; its interval is a
bootstrap over evaluation sequences.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import subprocess
import sys
import sysconfig
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer

import vllm_sparse
from vllm_sparse.compress import compress
from vllm_sparse.compress.evaluate import load_dense, negative_log_likelihood
from vllm_sparse.weight import count_violations

OURS: dict[str, dict[str, Any]] = {
    "magnitude": {"scheme": "bf16", "pruner": "magnitude"},
    "ours-sparsegpt": {"scheme": "bf16", "pruner": "sparsegpt", "iterations": 0},
    "ours-one-shot": {"scheme": "bf16"},
    "ours-w4a16": {"scheme": "w4a16"},
    "ours-fp8": {"scheme": "fp8"},
    "ours-curvature": {"scheme": "bf16", "curvature": 128},
    "ours-w4a16-curvature": {"scheme": "w4a16", "curvature": 128},
    "ours-residual": {"scheme": "bf16", "residual": 0.5},
    "ours-w4a16-residual": {"scheme": "w4a16", "residual": 0.5},
    "ours-residual-curvature": {"scheme": "bf16", "residual": 0.5, "curvature": 128},
    "ours-int8": {"scheme": "int8"},
    "ours-refine": {"scheme": "bf16", "refine": 400, "generate": 896},
}
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
RIVAL = "llmcompressor==0.14.0.1"
RIVALS = {"llmc-sparsegpt": "sparsegpt", "llmc-sparsegpt-gptq-remasked": "sparsegpt-gptq-remasked"}
COMPARED = {
    "ours-one-shot": "llmc-sparsegpt",
    "ours-w4a16": "llmc-sparsegpt-gptq-remasked",
    "ours-curvature": "llmc-sparsegpt",
    "ours-w4a16-curvature": "llmc-sparsegpt-gptq-remasked",
    "ours-residual": "llmc-sparsegpt",
    "ours-w4a16-residual": "llmc-sparsegpt-gptq-remasked",
    "ours-residual-curvature": "llmc-sparsegpt",
    "ours-refine": "llmc-sparsegpt",
}


def library_tokens(library: Path, tokenizer: Any, evaluation: bool) -> Tensor:
    """Return the token ids of one side of the split, end-of-text after each file."""
    ids: list[int] = []
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if {"site-packages", "test", "tests"} & set(name.parts):
            continue
        digest = int(hashlib.sha1(str(name).encode()).hexdigest(), 16)
        if (digest % 4 == 0) == evaluation:
            text = file.read_text(encoding="utf-8", errors="ignore")
            ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


def sequences(ids: Tensor, count: int, length: int, seed: int | None) -> Tensor:
    """Return ``[count, length]`` of ``ids``: a random draw, or evenly spaced where ``seed`` is None."""
    rows = ids[: len(ids) // length * length].view(-1, length)
    if seed is None:
        return rows[torch.linspace(0, len(rows) - 1, count).long()]
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


def rival_python(environment: Path) -> Path:
    """Return the interpreter of the rival's ``environment``, which is made first where there is none."""
    python, done = environment / "bin" / "python", environment / "complete"
    if not done.exists():  # or an installation was cut short
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        # The same torch as here first: both sides then multiply with the same libraries.
        for package in (f"torch=={torch.__version__.partition('+')[0]}", RIVAL):
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
        done.touch()
    return python


def is_2of4(model: nn.Module) -> bool:
    """Return whether every linear layer but the head is 2:4."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return not any(count_violations(linear.weight) for linear in linears)


def recovered(dense: Tensor, rival: Tensor, ours: Tensor) -> dict[str, float]:
    """Return R and its 95 % interval from the likelihoods of the same sequences."""
    draws = torch.randint(len(dense), (10000, len(dense)), generator=torch.Generator().manual_seed(0))
    means = [x[draws].mean(1) for x in (dense, rival, ours)]
    spread = ((means[1] - means[2]) / (means[1] - means[0])).quantile(torch.tensor([0.025, 0.975], dtype=dense.dtype))
    value = (rival.mean() - ours.mean()) / (rival.mean() - dense.mean())
    return {"R": round(float(value), 4), "low": round(float(spread[0]), 4), "high": round(float(spread[1]), 4)}


class Run:
    """One model, one draw of calibration tokens after another, and the rows they give."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[dict[str, Any]] = []
        self.likelihoods: dict[tuple[str, int], Tensor] = {}
        self.rival: list[dict[str, Any]] = []  # what it says of itself, by draw
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.calibration = library_tokens(args.text, tokenizer, evaluation=False)
        evaluation = library_tokens(args.text, tokenizer, evaluation=True)
        self.evaluation = sequences(evaluation, args.eval_sequences, 1024, None)

    def score(self, method: str, draw: int, path: Path, seconds: float | None) -> None:
        """Evaluate the model in ``path`` and add its row."""
        model = load_dense(path, self.args.device)
        nll = negative_log_likelihood(model, self.evaluation)
        self.likelihoods[method, draw] = nll
        row = {"method": method, "draw": draw, "nll": round(float(nll.mean()), 5)}
        row |= {"perplexity": round(math.exp(float(nll.mean())), 4), "valid_24": is_2of4(model), "seconds": seconds}
        self.rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    def draw(self, number: int) -> None:
        """Make and score every method with one draw of calibration tokens."""
        args = self.args
        tokens = sequences(self.calibration, args.samples, args.seq_len, number)
        work = args.work / f"draw{number}"
        work.mkdir(parents=True, exist_ok=True)
        if args.rival:
            self._rival(tokens, work / "rival", number)
        for method in args.methods:
            path = work / method
            if not path.is_dir():
                compress(args.model, path, calibration=tokens, device=args.device, quiet=True, **OURS[method])
            seconds = json.loads((path / "report.json").read_text())["seconds"]
            self.score(method, number, path, round(seconds, 1))

    def _rival(self, tokens: Tensor, out: Path, number: int) -> None:
        if not (out / "rival.json").is_file():
            shutil.rmtree(out, ignore_errors=True)  # a run that was cut short
            torch.save(tokens, out.with_suffix(".pt"))
            script = Path(__file__).with_name("accuracy_rival.py")
            subprocess.run(
                [rival_python(self.args.rival), script, self.args.model, out.with_suffix(".pt"), out], check=True
            )
        told = json.loads((out / "rival.json").read_text())
        self.rival.append({"draw": number} | told)
        seconds = (told["sparsegpt_seconds"], told["sparsegpt_seconds"] + told["gptq_seconds"])
        for (method, name), took in zip(RIVALS.items(), seconds, strict=True):
            self.score(method, number, out / name, round(took, 1))

    def result(self) -> dict[str, Any]:
        """Return everything to write."""
        gaps = []
        for (method, draw), ours in self.likelihoods.items():
            rival = self.likelihoods.get((COMPARED.get(method, ""), draw))
            if rival is not None:
                gap = recovered(self.likelihoods["dense", -1], rival, ours)
                gaps.append({"method": method, "rival": COMPARED[method], "draw": draw} | gap)
        draws = {draw for method, draw in self.likelihoods if method == "ours-fp8"}
        rounding = [
            {"draw": draw, "nll_difference": round(float((self.likelihoods["ours-fp8", draw] - bf16).mean()), 5)}
            for draw in sorted(draws)
            if (bf16 := self.likelihoods.get(("ours-one-shot", draw))) is not None
        ]
        versions = {"vllm-sparse": vllm_sparse.__version__, "torch": torch.__version__}
        if self.rival:
            versions["llmcompressor"] = self.rival[0]["version"]
        return {
            "machine": self.args.machine,
            "date": date.today().isoformat(),
            "versions": versions | {"transformers": transformers.__version__, "python": platform.python_version()},
            "model": Path(self.args.model).name,
            "calibration": {"sequences": self.args.samples, "length": self.args.seq_len},
            "evaluation": {"sequences": self.args.eval_sequences, "length": 1024},
            "rows": self.rows,
            "recovered": gaps,
            "fp8_against_bf16": rounding,
            "rival": self.rival,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=STANDARD_LIBRARY, help="a standard library")
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"))
    parser.add_argument("--rival", type=Path, help=f"environment of {RIVAL}, made where there is none")
    parser.add_argument("--methods", nargs="*", default=list(OURS), choices=OURS)
    parser.add_argument("--draws", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-sequences", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    run = Run(parser.parse_args())
    run.score("dense", -1, Path(run.args.model), None)
    for number in run.args.draws:
        run.draw(number)
        run.args.output.parent.mkdir(parents=True, exist_ok=True)
        run.args.output.write_text(json.dumps(run.result(), indent=1) + "\n")
    for gap in run.result()["recovered"]:
        print("  ".join(f"{key} {value}" for key, value in gap.items()))


if __name__ == "__main__":
    main()
