"""``LOFTQ_AUTOTUNE=1`` for the shapes of real models on this device. It prints the rows it finds, for the table."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import loftq_kernels as lk
from bench import harness
from bench.bench_gpu import DTYPE, GROUP, random_packed
from loftq_kernels.ops import triton_backend

FORMATS = ("nf2", "nf4", "int8")
SHAPES = ((4096, 4096), (28672, 8192))  # One of each shape class.
DECODE_ROWS, TILE_ROWS = (1, 16), (32, 128, 512, 2048)


def run(output: Path, *, quick: bool) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("python -m bench autotune: torch sees no CUDA device")
    os.environ["LOFTQ_AUTOTUNE"] = "1"
    from loftq_kernels.triton_kernels import autotune

    with torch.no_grad():
        for name in FORMATS[1:2] if quick else FORMATS:
            for shape in SHAPES[:1] if quick else SHAPES:
                packed = random_packed(name, shape)
                stored = packed.codes, packed.scale, packed.offset, packed.codebook
                for rows in DECODE_ROWS:
                    lk.qlora_linear(torch.randn(rows, shape[1], device="cuda", dtype=DTYPE), packed)
                for rows in () if quick else TILE_ROWS:
                    x = torch.randn(rows, shape[1], device="cuda", dtype=DTYPE)
                    triton_backend.qlora_linear(x, *stored, GROUP, None, None, 1.0, None, path="prefill")
                    grad = torch.randn(rows, shape[0], device="cuda", dtype=DTYPE)
                    triton_backend.qlora_linear_grad_input(
                        grad, *stored, shape[1], GROUP, None, None, 1.0, path="fused"
                    )
    cache = autotune.cache_of(torch.device("cuda", torch.cuda.current_device()))
    rows = autotune.table_rows(cache)
    print(rows)
    print(f"from {cache.path}, to be pasted into TABLE in loftq_kernels/triton_kernels/configs.py")
    harness.write_json(output / "autotune.json", {"rows": rows.splitlines()})
