"""Build the extension modules with CMake: ``_cpu`` where there is a C++ compiler, ``_cuda`` where there is nvcc.

``VLLM_SPARSE_CUDA=0`` leaves the CUDA part out, ``=1`` insists on it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def wants_cuda() -> bool:
    """Return whether to build the CUDA part: as the environment says, else where nvcc is."""
    choice = os.environ.get("VLLM_SPARSE_CUDA", "auto")
    if choice not in {"0", "1", "auto"}:
        raise SystemExit(f"VLLM_SPARSE_CUDA={choice}: expected 0, 1 or auto")
    return choice == "1" or (choice == "auto" and shutil.which("nvcc") is not None)


def has_compiler() -> bool:
    """Return whether a C++ compiler can be found; without one the package runs on its reference kernels."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


class CMakeBuild(build_ext):
    """Run CMake once; the extension modules land in the package."""

    def run(self) -> None:
        import pybind11

        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVLLM_SPARSE_CUDA={'ON' if wants_cuda() else 'OFF'}", f"-DVLLM_SPARSE_OUTPUT={target / 'vllm_sparse'}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)


class NoBuild(build_ext):
    """Build nothing, and say so."""

    def run(self) -> None:
        print("vllm-sparse: no C++ compiler found, only the reference kernels will be available", file=sys.stderr)


setup(
    ext_modules=[Extension("vllm_sparse._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild if has_compiler() else NoBuild},
)
