"""Seconds that compressing a model takes on a CPU, llm-compressor and this package in turns.

    python -m benchmarks.compress_speed MODEL --rival ENV -o benchmarks/results/<machine>/compress-speed-NAME.json

Both are given the same tokens and the same recipe file of llm-compressor, each in a process of its own, the first one
of a pair by turns. The rival runs with its defaults (one sequence at a time, one calibration for each modifier); with
``--search N`` its other settings are tried first, on N sequences. ``--pairs`` is one number for each of ``--threads``;
none is begun after ``--minutes``. Last come our own defaults, which do more than the rival's recipe. For a quick look:
``--sequences 8 --pairs 1 1``.

Every sample is written, with seconds of the call (of the rival, ``oneshot`` alone; of ours everything from the files of
one model to the verified files of the other) and of the whole process; ratios are of medians of the call. ENV is the
rival's own virtual environment, made with pip where there is none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.accuracy import RIVAL, STANDARD_LIBRARY, library_tokens, rival_python, sequences

SPARSEGPT = """\
sparsity_stage:
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", targets: [Linear], ignore: ["re:.*lm_head"]}
"""
GPTQ = """\
quantization_stage:
  quantization_modifiers:
    GPTQModifier: {scheme: W4A16, targets: [Linear], ignore: ["re:.*lm_head"]}
"""
RECIPES = {"sparsegpt": SPARSEGPT, "sparsegpt-gptq": SPARSEGPT + GPTQ}
DEFAULTS = {"default-bf16": "scheme: bf16\n", "default-w4a16": "scheme: w4a16\n"}
COMPARED = {name: name for name in RECIPES} | {"default-bf16": "sparsegpt", "default-w4a16": "sparsegpt-gptq"}
RIVAL_DEFAULT = {"batch_size": 1, "pipeline": "independent"}
RIVAL_OTHERS = [{"batch_size": 8, "pipeline": "independent"}, {"batch_size": 1, "pipeline": "sequential"}]
WAITS = ("passive", "")  # how threads wait for each other: asleep, as `vllm-sparse compress` asks for, or the default


class Bench:
    """The runs of one benchmark and the file that has them, written anew after each."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.end = time.monotonic() + 60 * args.minutes
        self.python = {"ours": Path(sys.executable), "rival": rival_python(args.rival)}
        self.rows: list[dict[str, Any]] = []
        self.search: list[dict[str, Any]] = []
        self.versions: dict[str, dict[str, str]] = {}
        self.rival_wait = WAITS[0]
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        library = library_tokens(STANDARD_LIBRARY, tokenizer, evaluation=False)
        self.tokens = sequences(library, args.sequences, args.length, 0)
        for name, text in (RECIPES | DEFAULTS).items():
            (work / f"{name}.yaml").write_text(text)

    def run(self, tool: str, recipe: str, threads: int, count: int, wait: str, **settings: Any) -> dict[str, Any]:
        """Run one tool in a process of its own on the first ``count`` sequences; return the sample."""
        tokens, job, out = self.work / "tokens.pt", self.work / "job.json", self.work / "out"
        torch.save(self.tokens[:count].clone(), tokens)
        told = {"tool": tool, "model": str(self.args.model), "tokens": str(tokens), "out": str(out)}
        job.write_text(json.dumps(told | {"recipe": str(self.work / f"{recipe}.yaml")} | settings))
        shutil.rmtree(out, ignore_errors=True)
        script = Path(__file__).with_name("compress_speed_run.py")
        path = f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        # Both sides find their modules compiled from the second process on, whatever this environment says.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPYCACHEPREFIX": str(self.work / f"{tool}-pycache")}
        environment |= {"PYTHONPATH": path if tool == "ours" else ""} | ({"OMP_WAIT_POLICY": wait} if wait else {})
        with (self.work / "output.txt").open("w+") as output:
            started = time.monotonic()
            process = subprocess.Popen([self.python[tool], script, job], stdout=output, stderr=output, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            wall = time.monotonic() - started
            output.seek(0)
            text = output.read().strip()
        if process.returncode:
            raise SystemExit(f"{tool} failed on {recipe}:\n{text[-2000:]}")
        call = json.loads(text.splitlines()[-1])
        assert call["threads"] == threads
        self.versions[tool] = call["versions"]
        sample = {"tool": tool, "recipe": recipe, "threads": threads, "wait": wait or "default", "sequences": count}
        sample |= settings
        sample |= {"call_wall": round(call["wall"], 2), "call_cpu": round(call["cpu"], 2)}
        cpu = usage.ru_utime + usage.ru_stime
        sample |= {"process_wall": round(wall, 2), "process_cpu": round(cpu, 2), "peak_mb": usage.ru_maxrss >> 10}
        print("  ".join(f"{key} {value}" for key, value in sample.items()), flush=True)
        return sample

    def sample(self, tool: str, recipe: str, threads: int, count: int) -> dict[str, Any]:
        """Run a tool as it is compared."""
        if tool == "rival":
            return self.run(tool, recipe, threads, count, self.rival_wait, **RIVAL_DEFAULT)
        return self.run(tool, recipe, threads, count, WAITS[0])

    def search_settings(self) -> None:
        """Try the rival's settings on few sequences, and let its threads wait in the way that suits it better."""
        count, most = self.args.search, max(self.args.threads)

        def tried(recipe: str, threads: int, wait: str, settings: dict[str, Any]) -> float:
            self.search.append(self.run("rival", recipe, threads, count, wait, **settings))
            self.write()
            return self.search[-1]["call_wall"]

        self.rival_wait = min(WAITS, key=lambda wait: tried("sparsegpt", most, wait, RIVAL_DEFAULT))
        for recipe, threads in itertools.product(RECIPES, self.args.threads):
            for settings in (RIVAL_DEFAULT, *RIVAL_OTHERS):
                if recipe == "sparsegpt" and settings["pipeline"] == "sequential":
                    continue  # of one modifier, it is the same
                if (recipe, threads, settings) != ("sparsegpt", most, RIVAL_DEFAULT):
                    tried(recipe, threads, self.rival_wait, settings)

    def pairs(self) -> None:
        """Run pairs, the first of each by turns."""
        wanted = [
            (number, threads)
            for number in range(max(self.args.pairs))
            for threads, pairs in zip(self.args.threads, self.args.pairs, strict=True)
            if number < pairs
        ]
        for (number, threads), recipe in itertools.product(wanted, RECIPES):
            if time.monotonic() > self.end:
                break
            for tool in ("rival", "ours") if number % 2 == 0 else ("ours", "rival"):
                self.rows.append({"pair": number} | self.sample(tool, recipe, threads, self.args.sequences))
                self.write()
        for threads, recipe in itertools.product(self.args.threads[:1], DEFAULTS):
            self.rows.append({"pair": 0} | self.sample("ours", recipe, threads, self.args.sequences))
            self.write()

    def ratios(self) -> list[dict[str, Any]]:
        """Return rival / ours of the medians, by recipe and threads, and against the rival's best number of threads."""

        def middle(tool: str, recipe: str, threads: int, what: str) -> float | None:
            same = (tool, recipe, threads)
            found = [row[what] for row in self.rows if (row["tool"], row["recipe"], row["threads"]) == same]
            return median(found) if found else None

        result = []
        for recipe, threads in itertools.product(COMPARED, self.args.threads):
            row: dict[str, Any] = {"recipe": recipe, "against": COMPARED[recipe], "threads": threads}
            for what in ("call_wall", "call_cpu", "process_wall", "process_cpu"):
                own, theirs = middle("ours", recipe, threads, what), middle("rival", COMPARED[recipe], threads, what)
                if own and theirs:
                    row[what] = round(theirs / own, 2)
                all_theirs = [middle("rival", COMPARED[recipe], other, what) for other in self.args.threads]
                if own and (known := [value for value in all_theirs if value]):
                    row[f"{what}_against_best"] = round(min(known) / own, 2)
            if len(row) > 3:
                result.append(row)
        return result

    def write(self) -> None:
        """Write what is known so far."""
        result = {
            "machine": self.args.machine,
            "date": date.today().isoformat(),
            "versions": self.versions | {"python": platform.python_version()},
            "model": Path(self.args.model).name,
            "calibration": {"sequences": self.args.sequences, "length": self.args.length},
            "rival": RIVAL,
            "recipes": RECIPES | DEFAULTS,
            "rows": self.rows,
            "search": self.search,
            "ratios": self.ratios(),
        }
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        self.args.output.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rival", type=Path, required=True, help=f"environment of {RIVAL}, made where there is none")
    parser.add_argument("--pairs", type=int, nargs="+", default=[3, 1])
    parser.add_argument("--minutes", type=float, default=60, help="begin no pair after that")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--search", type=int, default=0, help="sequences on which to try other settings of the rival")
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args, Path(work))
        for tool in bench.python:  # compiles what both import
            bench.sample(tool, "sparsegpt", args.threads[0], 1)
        if args.search:
            bench.search_settings()
        bench.pairs()
    for row in bench.ratios():
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
