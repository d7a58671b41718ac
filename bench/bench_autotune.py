"""``LOFTQ_AUTOTUNE=1`` for the shapes of real models on this device. It prints the rows it finds, for the table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

import loftq_kernels as lk
from bench import harness
from bench.ours import random_packed
from bench.peers import DTYPE, GROUP, Shape
from bench.subject import Subject
from loftq_kernels.ops import triton_backend

SUBJECT = Subject(
    takes="several minutes of a GPU",
    quick="1 min of a GPU",
    needs=("triton",),
    gpu=True,
    options=("shapes", "rows", "formats"),
    asked=True,
)
FORMATS = ("nf2", "nf4", "int8")
SHAPES = ((4096, 4096), (28672, 8192))  # One of each shape class.
DECODE_ROWS, TILE_ROWS = (1, 16), (32, 128, 512, 2048)


def run(
    output: Path,
    *,
    quick: bool,
    shapes: Sequence[Shape] | None = None,
    rows: Sequence[int] | None = None,
    formats: Sequence[str] | None = None,
) -> None:
    os.environ["LOFTQ_AUTOTUNE"] = "1"
    from loftq_kernels.triton_kernels import autotune

    cases = list(product(formats or (FORMATS[1:2] if quick else FORMATS), shapes or (SHAPES[:1] if quick else SHAPES)))
    with torch.no_grad():
        for name, shape in harness.progress(cases, lambda case: f"autotune {case[0]} {case[1][0]}x{case[1][1]}"):
            tune(name, shape, rows or DECODE_ROWS, () if quick else rows or TILE_ROWS)
    cache = autotune.cache_of(torch.device("cuda", torch.cuda.current_device()))
    found = autotune.table_rows(cache)
    print(found)
    print(f"from {cache.path}, to be pasted into TABLE in loftq_kernels/triton_kernels/configs.py")
    results = {"rows": found.splitlines(), "spread": "none: the search keeps no times"}
    harness.write_json(harness.result_file(output, "autotune", quick=quick), results)


def tune(name: str, shape: Shape, decode_rows: Sequence[int], tile_rows: Sequence[int]) -> None:
    """Products that make the tuner search: decode's kernel, then both with tiles."""
    packed = random_packed(name, shape, "cuda")
    stored = packed.codes, packed.scale, packed.offset, packed.codebook
    for rows in decode_rows:
        lk.qlora_linear(torch.randn(rows, shape[1], device="cuda", dtype=DTYPE), packed)
    for rows in tile_rows:
        x = torch.randn(rows, shape[1], device="cuda", dtype=DTYPE)
        triton_backend.qlora_linear(x, *stored, GROUP, None, None, 1.0, None, path="prefill")
        grad = torch.randn(rows, shape[0], device="cuda", dtype=DTYPE)
        triton_backend.qlora_linear_grad_input(grad, *stored, shape[1], GROUP, None, None, 1.0, path="fused")
