"""Host time of a decode call, without that of Triton: a decode step makes hundreds of such calls.

It runs on any machine: the kernel is a stub and the tensors are on the host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

import loftq_kernels as lk
from bench import harness
from loftq_kernels.ops import triton_backend


def run(output: Path, *, quick: bool) -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # The backend takes CPU tensors only then.
    from loftq_kernels.triton_kernels import decode_launch

    class Stub:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    rows = []
    real, decode_launch.decode_linear_kernel = decode_launch.decode_linear_kernel, Stub()
    try:
        for name in ("nf4", "int4", "int8"):
            packed = lk.quantize(torch.randn(512, 512), name, backend="reference")
            stored = packed.codes, packed.scale, packed.offset, packed.codebook, 64
            x, bias = torch.randn(1, 512, dtype=torch.bfloat16), torch.randn(512, dtype=torch.bfloat16)
            for rank in (None, 16):
                lora = (None, None)
                if rank is not None:
                    lora = torch.randn(rank, 512).bfloat16(), torch.randn(512, rank).bfloat16()
                arguments = x, *stored, *lora
                plan = decode_launch.plan_for(*arguments, None, 1.0, bias)
                tensors = x, *stored[:4], *lora, None, 1.0, bias
                with torch.no_grad():
                    rows.append({
                        "format": name,
                        "rank": rank or 0,
                        "launch, us": per_call(lambda plan=plan, t=tensors: plan.launch(*t), quick),
                        "backend, us": per_call(
                            lambda a=arguments, b=bias: triton_backend.qlora_linear(*a, 1.0, b), quick
                        ),
                    })  # fmt: skip
    finally:
        decode_launch.decode_linear_kernel = real
    harness.print_table(rows)
    harness.write_json(output / "overhead.json", {"rows": rows})


def per_call(call: Callable[[], object], quick: bool) -> float:
    """Microseconds per call: the least of several means, as other work on the machine can only add time."""
    calls, means = 200, []
    for _ in range(3 if quick else 15):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - started) / calls)
    return 1e6 * min(means)
