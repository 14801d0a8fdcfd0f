"""The built CUDA module, read by cuobjdump: GPUs, instructions, spilled registers, registers written too early."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.kernels.machine_code import overwritten
from vllm_sparse.kernels import cuda_mma


def _cuobjdump() -> str | None:
    """Return the toolkit's program, or the copy that Triton brings."""
    spec = importlib.util.find_spec("triton")
    beside = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"]
    return shutil.which("cuobjdump") or next((str(path) for path in beside if path.is_file()), None)


CUOBJDUMP = _cuobjdump()
pytestmark = [
    pytest.mark.skipif(cuda_mma._cuda is None, reason="the extension module vllm_sparse._cuda is not built"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump"),
]
# 8.0 runs on 8.6 and 8.7 too; 12.0 is there as PTX as well, for what comes after.
PORTABLE = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
HOPPER = "sm_90a"
# Sparse instructions of the machine code, where mma.sp is native.
INSTRUCTIONS = {
    "HMMA.SP.16832.F32.BF16": "bf16 x bf16",
    "HMMA.SP.16832.F32": "fp16 x fp16",
    "IMMA.SP.16864.S8.S8": "int8 x int8",
}
E4M3 = "QMMA.SP.16864.F32.E4M3.E4M3"


def dump(*options: str) -> str:
    module = str(importlib.import_module("vllm_sparse._cuda").__file__)
    return subprocess.run([str(CUOBJDUMP), *options, module], capture_output=True, text=True, check=True).stdout


def instructions(architecture: str, kernel: str) -> Counter[str]:
    """Return how often each sparse or spilling instruction stands in the functions whose names hold ``kernel``."""
    found: Counter[str] = Counter()
    for function in dump("-sass", "-arch", architecture).split("Function : ")[1:]:
        if kernel in function.split("\n", 1)[0]:
            found.update(re.findall(r"\b[A-Z]MMA\.SP\.[A-Z0-9.]+|\b(?:STL|LDL)\b", function))
    return found


def test_every_gpu_has_its_code() -> None:
    architectures = set(re.findall(r"\.(sm_\w+)\.cubin", dump("--list-elf")))
    assert architectures == {*PORTABLE, HOPPER}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", dump("--list-ptx"))) == {"sm_120"}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89"])
def test_sparse_instructions_are_native_and_nothing_spills(architecture: str) -> None:
    found = instructions(architecture, "mma_linear_kernel")
    wanted = {*INSTRUCTIONS, E4M3} if architecture == "sm_89" else set(INSTRUCTIONS)
    assert set(found) == wanted


def test_no_function_spills_registers() -> None:
    """Spilled registers show as stack."""
    architecture, function, architectures, with_stack = "", "", set(), []
    for line in dump("--dump-resource-usage").splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            architecture = found[1]
            architectures.add(architecture)
        if found := re.search(r"Function (\S+):", line):
            function = found[1]
        if (found := re.search(r"STACK:(\d+)", line)) and int(found[1]) > 0:
            with_stack.append((architecture, function, int(found[1])))
    assert architectures == {*PORTABLE, HOPPER}
    assert with_stack == []


def test_no_register_is_written_while_wgmma_reads_it() -> None:
    functions = dump("-sass", "-arch", HOPPER).split("Function : ")[1:]
    names = [function.split("\n", 1)[0] for function in functions if "GMMA.SP" in function]
    assert any("w4a16_wgmma_kernel" in name for name in names) and any("hopper" in name for name in names)
    found = {function.split("\n", 1)[0]: overwritten(function) for function in functions}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_sanitizers_program_compiles(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    source = root / "tests" / "csrc" / "w4a16_small.cu"
    command = ["nvcc", "-std=c++17", f"-I{root / 'csrc' / 'cuda'}", "-c", str(source), "-o", str(tmp_path / "small.o")]
    subprocess.run(command, check=True)
