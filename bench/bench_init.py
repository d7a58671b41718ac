"""The LoftQ initializer's cost: speed against PEFT's loop and a randomized one, memory, a whole decoder layer.

4096x4096, nf4, r=64, T=5, and where the time goes against the floor; peak memory at 4096x11008; one decoder layer of
Llama-2-7B's shapes. bench_init_quality.py judges the errors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loftq_kernels as lk
from bench import harness
from bench.bench_init_quality import matrix
from bench.peers import Shape, package
from bench.subject import Subject

SUBJECT = Subject(takes="4 min", quick="15 s", uses=("bitsandbytes",), options=("shapes",))
LLAMA_LAYER = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}  # Llama-2-7B: q k v o, gate up, down; 32 layers
OURS = "loftq_kernels"
PEFT = "PEFT's loop, full SVD (one alternation)"
RANDOMIZED = "the loop with torch.svd_lowrank"


def run(output: Path, *, quick: bool, shapes: Sequence[Shape] | None = None) -> None:
    """The file is written after each part."""
    path = harness.result_file(output, "init", quick=quick)
    why = package("bitsandbytes")()
    missing = {} if why is None else {f"{PEFT}; {RANDOMIZED}": f"their quantizer is that of bitsandbytes: {why}"}
    side = 1024 if quick else 4096
    parts: dict[str, Callable[[], dict]] = {
        f"speed {n}x{k}": partial(speed, (n, k), missing) for n, k in shapes or [(side, side)]
    }
    if shapes is None:
        parts |= {
            "memory": partial(memory, side, 2752 if quick else 11008),
            "llama": partial(llama_layer, quick),
        }
    results: dict[str, Any] = {"not measured": missing}
    for name in harness.progress(list(parts), lambda name: f"init: {name}"):
        results[name.partition(" ")[0] if shapes is None else name] = parts[name]()
        harness.write_json(path, results)
    for what, reason in missing.items():
        print(f"not measured: {what}: {reason}")


# ---- speed


def speed(shape: Shape, missing: dict[str, str], name: str = "nf4", rank: int = 64, num_iter: int = 5) -> dict:
    """Seconds for one matrix, in turns, medians of 5: ours, one alternation of PEFT's loop, the svd_lowrank loop."""
    weight = matrix("gaussian", *shape)
    variants = {OURS: lambda: lk.loftq_init(weight, name, rank, num_iter)}
    if not missing:
        variants[PEFT] = lambda: _peer_loop(weight, rank, 1, _full_svd)
        variants[RANDOMIZED] = lambda: _peer_loop(weight, rank, num_iter, _svd_lowrank)
    row = harness.timed_row({}, harness.timings(variants, repeats=5))
    ours = row[OURS]
    floor = _floor(shape, rank, num_iter)
    result = {
        "shape": list(shape),
        "format": name,
        "rank": rank,
        "num_iter": num_iter,
        "seconds": ours,
        "error": lk.loftq_init(weight, name, rank, num_iter).error,
        "where the time goes": _profile(weight, name, rank, num_iter),
        "floor": floor,
        "times the floor": ours / (floor["seconds by FLOPs"] + floor["seconds by bytes"]),
        "measured, seconds": row,
    }
    if not missing:
        result |= {
            "PEFT-style loop, seconds (one alternation x num_iter)": row[PEFT] * num_iter,
            "svd_lowrank loop, seconds": row[RANDOMIZED],
            "svd_lowrank loop, error": _peer_loop(weight, rank, num_iter, _svd_lowrank),
            "PEFT-style loop, error": _peer_loop(weight, rank, num_iter, _full_svd),
            "times faster than PEFT's": row[PEFT] * num_iter / ours,
            "times faster than svd_lowrank's": row[RANDOMIZED] / ours,
        }
    print(json.dumps(result, indent=1))
    return result


def _peer_loop(weight: Tensor, rank: int, num_iter: int, factorize) -> float:
    """LoftQ as PEFT runs it, on bitsandbytes' NF4 quantizer. The final relative error."""
    from bitsandbytes import functional

    def rounded(values: Tensor) -> Tensor:
        return functional.dequantize_4bit(*functional.quantize_4bit(values, quant_type="nf4", blocksize=64))

    target = weight.clone()
    for _ in range(num_iter):
        dense = rounded(target)
        left, right = factorize(weight - dense, rank)
        target = weight - left @ right
    return ((weight - dense - left @ right).norm() / weight.norm()).item()


def _full_svd(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] @ torch.diag(root), torch.diag(root) @ vh[:rank]


def _svd_lowrank(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(residual, q=rank + 10, niter=4)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T


def _profile(weight: Tensor, name: str, rank: int, num_iter: int) -> dict[str, float]:
    """Milliseconds of self time by operator, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        lk.loftq_init(weight, name, rank, num_iter)
    times = {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:12])


def _floor(shape: Shape, rank: int, num_iter: int) -> dict[str, float]:
    """The products with the residual and the passes over memory that the algorithm needs, over rates measured now."""
    from loftq_kernels.initializers.drivers import low_rank

    size, width = shape[0] * shape[1], low_rank.block_width(rank)
    passes = 2 * low_rank.COLD_STEPS + 2 + (num_iter - 1) * (2 * low_rank.warm_steps(min(shape), 4) + 1)
    flops = 2 * size * (passes * width + (num_iter - 1) * rank)
    a, b = (torch.randn(1024, 1024, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 1024**3 / harness.interleaved({"bf16 1024^3": lambda: a @ b}, repeats=20)["bf16 1024^3"]
    # To quantize, each alternation reads the float32 weight and reads and writes the bfloat16 residual once; the
    # products read the residual once per pass.
    traffic = size * (num_iter * (4 + 2 + 2) + passes * 2)
    bandwidth = harness.read_bandwidth()
    return {
        "GFLOP": flops / 1e9,
        "bf16 GFLOP/s (1024^3 product)": rate / 1e9,
        "GB moved": traffic / 1e9,
        "GB/s": bandwidth / 1e9,
        "seconds by FLOPs": flops / rate,
        "seconds by bytes": traffic / bandwidth,
    }


# ---- memory and whole models

_PEAK_SCRIPT = """
import sys, torch, loftq_kernels as lk

def status(key):  # Of this process alone: getrusage's peak would include the parent's.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

rows, columns = map(int, sys.argv[1:])
lk.loftq_init(torch.randn(256, 320), "nf4", 64, 2, svd="fast")  # This loads libraries and thread pools.
weight = torch.randn(rows, columns)
resident = status("VmRSS")
lk.loftq_init(weight, "nf4", 64, 5)
print(status("VmHWM") - resident)
"""


def memory(rows: int, columns: int) -> dict:
    """Peak resident memory that one call adds, in a process of its own."""
    command = [sys.executable, "-c", _PEAK_SCRIPT, str(rows), str(columns)]
    extra = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result = {"shape": [rows, columns], "extra bytes": extra, "times the float32 matrix": extra / (4 * rows * columns)}
    print(json.dumps(result))
    return result


def llama_layer(quick: bool) -> dict:
    """One decoder layer of Llama-2-7B's shapes, nf4, r=64, T=5, and 32 times that."""
    divisor = 8 if quick else 1
    seconds = {}
    for (rows, columns), count in LLAMA_LAYER.items():
        weights = [matrix("gaussian", rows // divisor, columns // divisor) for _ in range(count)]
        started = time.perf_counter()
        lk.loftq_init_batch(weights, "nf4", 64, 5)
        seconds[f"{count} x {rows // divisor}x{columns // divisor}"] = time.perf_counter() - started
    layer = sum(seconds.values())
    result = {"seconds by shape": seconds, "layer": layer, "32 layers (layer x 32), minutes": layer * 32 / 60}
    print(json.dumps(result))
    return result
