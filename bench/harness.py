"""What every benchmark shares: interleaved timing, the machine's description, JSON files."""

from __future__ import annotations

import json
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

import loftq_kernels as lk
from loftq_kernels.ops import extension


def interleaved(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant.

    Variants take turns, so that a slow minute of the machine hits all alike, and their order changes: what ran before
    leaves caches and threads in a state that may cost the next variant half of its time.
    """
    for run in variants.values():
        run()  # First calls load libraries, allocate and compile.
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    shuffle = random.Random(0).shuffle
    order = list(variants.items())
    for _ in range(repeats):
        shuffle(order)
        for name, run in order:
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


def copies(nbytes: int, rotated: int) -> range:
    """One index for each of the weights of nbytes that together exceed the caches: at least `rotated` bytes."""
    return range(max(2, -(-rotated // nbytes)))


def read_bandwidth(megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes per second that this process reads from memory with all threads: a sum over a buffer beyond the caches."""
    buffer = torch.ones(megabytes << 18, dtype=torch.int32)
    return buffer.nbytes / interleaved({"sum": lambda: buffer.view(torch.int64).sum()}, repeats)["sum"]


def machine() -> dict[str, Any]:
    """Processor, threads, versions, kernels, time and command, which a reader of the figures needs."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": extension._C.cpu_isa() if extension._C is not None else "none: plain-torch reference",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "loftq_kernels": lk.__version__,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results and the machine's description. The file is replaced at once, as a run may be cut any time."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def print_table(rows: list[Mapping[str, Any]]) -> None:
    """Rows of equal keys, aligned; None is left blank."""
    if not rows:
        return
    texts = [[key for key in rows[0]]] + [
        [f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value) for value in row.values()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for text in texts:
        print("  ".join(cell.rjust(width) for cell, width in zip(text, widths, strict=True)))
