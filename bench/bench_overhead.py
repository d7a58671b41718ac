"""Host time of a decode call, without that of Triton: a decode step makes hundreds of such calls.

It runs on any machine: the kernel is a stub and the tensors are on the host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch

import loftq_kernels as lk
from bench import harness
from bench.subject import Subject
from loftq_kernels.ops import triton_backend

SUBJECT = Subject(takes="10 s", quick="5 s", needs=("triton",), options=("formats",), asked=True)
FORMATS, RANKS = ("nf4", "int4", "int8"), (None, 16)
CALLS = 200  # Each figure is a mean of so many.


def run(output: Path, *, quick: bool, formats: Sequence[str] | None = None) -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # The backend takes CPU tensors only then.
    rows = []
    with stubbed_kernel(), torch.no_grad():
        cases = list(product(formats or FORMATS, RANKS))
        for name, rank in harness.progress(cases, lambda case: f"overhead {case[0]}, rank {case[1] or 0}"):
            times = {what: per_call(call, 3 if quick else 15) for what, call in calls(name, rank).items()}
            rows.append(harness.timed_row({"format": name, "rank": rank or 0}, times, per_second=1e6))
    for row in rows:  # Other work on the machine can only add time, so it is the least that counts.
        row |= {f"least {name}": spread[0] for name, spread in row["spread"].items()}
    harness.print_table(rows)
    harness.write_json(harness.result_file(output, "overhead", quick=quick), {"rows": rows})


@contextmanager
def stubbed_kernel() -> Iterator[None]:
    from loftq_kernels.triton_kernels import decode_launch

    class Stub:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    real, decode_launch.decode_linear_kernel = decode_launch.decode_linear_kernel, Stub()
    try:
        yield
    finally:
        decode_launch.decode_linear_kernel = real


def calls(name: str, rank: int | None) -> dict[str, Callable[[], object]]:
    """One decode call of a 512x512 layer with a bias: the launch of a plan, and all that the backend does."""
    from loftq_kernels.triton_kernels import decode_launch

    packed = lk.quantize(torch.randn(512, 512), name, backend="reference")
    stored = packed.codes, packed.scale, packed.offset, packed.codebook, 64
    x, bias = torch.randn(1, 512, dtype=torch.bfloat16), torch.randn(512, dtype=torch.bfloat16)
    lora = (None, None)
    if rank is not None:
        lora = torch.randn(rank, 512).bfloat16(), torch.randn(512, rank).bfloat16()
    arguments = x, *stored, *lora
    plan = decode_launch.plan_for(*arguments, None, 1.0, bias)
    tensors = x, *stored[:4], *lora, None, 1.0, bias
    return {
        "launch, us": lambda: plan.launch(*tensors),
        "backend, us": lambda: triton_backend.qlora_linear(*arguments, 1.0, bias),
    }


def per_call(call: Callable[[], object], repeats: int) -> harness.Timing:
    """Seconds per call: means of CALLS calls."""
    means = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append((time.perf_counter() - started) / CALLS)
    return harness.Timing.of(means)
