"""What a reader of figures needs to know of the machine, the software and the run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import loftq_kernels as lk
from loftq_kernels.ops import extension

PACKAGES = ("numpy", "bitsandbytes", "gemlite", "torchao", "transformers", "peft", "matplotlib", "llama_cpp_python")
SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "LOFTQ_", "TORCH_", "GGML_")  # Prefixes of variables that matter.
_FEATURES = re.compile(r"(avx|amx|fma$|f16c|vnni|asimd|sve|sme|bf16|i8mm|neon)")
_ROOT = Path(__file__).parents[1]


def machine() -> dict[str, Any]:
    """Processor, threads, versions, kernels, commit, settings, load, date and command."""
    return {
        **processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cpu_kernels": extension._C.cpu_isa() if extension._C is not None else "none: plain-torch reference",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "loftq_kernels": lk.__version__,
        "commit": commit(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
        "system": platform.platform(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def processor() -> dict[str, str]:
    """Name, model (a name alone may leave open which it is: "AMD EPYC") and instruction sets."""
    try:
        return parsed(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return _from_sysctl()


def parsed(cpuinfo: str) -> dict[str, str]:
    """The first processor of /proc/cpuinfo, of x86 or of ARM."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    x86 = ("vendor_id", "cpu family", "model", "stepping")
    arm = ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
    model = ", ".join(f"{key.removeprefix('CPU ')} {fields[key]}" for key in x86 + arm if key in fields)
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "processor": fields.get("model name") or fields.get("Model") or platform.machine(),
        "processor_model": model or platform.machine(),
        "processor_isa": " ".join(sorted(flag for flag in flags if _FEATURES.search(flag))) or platform.machine(),
    }


def _from_sysctl() -> dict[str, str]:
    keys = {
        "processor": "machdep.cpu.brand_string",
        "processor_model": "hw.model",
        "processor_isa": "machdep.cpu.features",
    }
    return {name: _output(["sysctl", "-n", key]) or platform.machine() for name, key in keys.items()}


def commit() -> str:
    """`git describe` of the source tree; "dirty" where its files differ from the commit."""
    described = _output(["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--tags"])
    return described or "unknown: not a git checkout"


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
