"""The extension modules exist wherever the tools to build them do, so that no kernel test is skipped unnoticed."""

import importlib
import os
import shutil

import pytest

import vllm_sparse.kernels.reference  # noqa: F401 (torch, and with it the OpenMP runtime, comes first)


def test_the_cpu_module_is_built():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    importlib.import_module("vllm_sparse._cpu")


def test_the_cuda_module_is_built():
    if os.environ.get("VLLM_SPARSE_CUDA") == "0" or shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc, or VLLM_SPARSE_CUDA=0")
    importlib.import_module("vllm_sparse._cuda")
