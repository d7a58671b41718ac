"""What a reader of figures needs to know of the machine, the software and the run."""

from __future__ import annotations

import functools
import os
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import loftq_kernels as lk
from loftq_kernels.cli.processor import output_of, processor
from loftq_kernels.ops import extension

PACKAGES = ("numpy", "bitsandbytes", "gemlite", "torchao", "transformers", "peft", "matplotlib", "llama_cpp_python")
SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "LOFTQ_")  # Prefixes of variables that change how fast this is.
LOAD = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None  # Before anything is measured.
_ROOT = Path(__file__).parents[1]


def machine() -> dict[str, Any]:
    """Processor, threads, versions, kernels, commit, settings, load, date and command."""
    return {
        **processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load average at the start": LOAD,
        "cpu_kernels": extension.library.cpu_isa() if extension.library is not None else "none: plain-torch reference",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "loftq_kernels": lk.__version__,
        "commit": commit(),
        "settings": settings(),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def settings() -> dict[str, str]:
    """Variables of threads and kernels; no paths, which say nothing elsewhere."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS) and os.sep not in v}


@functools.cache
def commit() -> str:
    """`git describe` of the source tree; "dirty" where its files differ from the commit.

    It is asked once, as the files that --publish writes make the tree differ.
    """
    described = output_of(["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--tags"])
    return described or "unknown: not a git checkout"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
