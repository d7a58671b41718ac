"""The bindings of the CUDA kernels compile, also against a torch without CUDA, which cannot link or run them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

CSRC = Path(__file__).parents[1] / "csrc"
CUDA_INCLUDE = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"


@pytest.mark.slow
@pytest.mark.skipif(not (CUDA_INCLUDE / "cuda_runtime_api.h").exists(), reason="there is no CUDA toolkit")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("source", sorted(CSRC.glob("bindings/*_cuda.cpp")), ids=lambda path: path.name)
def test_compiles(source):
    folders = [CSRC / "include", CSRC, *cpp_extension.include_paths()]
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-isystem", CUDA_INCLUDE]
    checked = subprocess.run(
        [*command, *(f"-I{folder}" for folder in folders), source], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
