"""Quantize and dequantize one weight: our kernels against the plain-torch reference and bitsandbytes, same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import loftq_kernels as lk
from bench import harness
from bench.peers import package
from bench.subject import Subject

SUBJECT = Subject(takes="1 min", quick="10 s", uses=("bitsandbytes",), options=("shapes", "formats"))
REPEATS = 5


def run(
    output: Path,
    *,
    quick: bool,
    shapes: Sequence[tuple[int, int]] | None = None,
    formats: Sequence[str] | None = None,
) -> None:
    why = package("bitsandbytes")()
    missing = {} if why is None else {"bitsandbytes": why}
    rows = []
    cases = list(
        product(shapes or [(1024, 1024) if quick else (4096, 4096)], formats or lk.format_names(), (False, True))
    )
    for shape, name, search in harness.progress(cases, lambda case: f"quantize {case[1]}, search: {case[2]}"):
        rows.append(_one(shape, name, search, missing))
    harness.print_table(rows, missing)
    bandwidth = harness.read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    results = {"read_bandwidth": bandwidth, "not measured": missing, "milliseconds": rows}
    harness.write_json(harness.result_file(output, "quantize", quick=quick), results)


def _one(shape: tuple[int, int], name: str, search: bool, missing: dict[str, str]) -> dict:
    """One row of milliseconds; peers have no column where they lack the format."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = lk.quantize(weight, name, scale_search=search)
    variants = {
        "quantize": lambda: lk.quantize(weight, name, scale_search=search),
        "dequantize": lambda: packed.dequantize(),
        "dequantize bf16": lambda: packed.dequantize(torch.bfloat16),
    }
    if not search:
        variants["reference quantize"] = lambda: lk.quantize(weight, name, backend="reference")
        variants["reference dequantize"] = lambda: packed.dequantize(backend="reference")
        if name == "nf4" and "bitsandbytes" not in missing:
            variants |= _bitsandbytes(weight)
    place = {"N x K": f"{shape[0]}x{shape[1]}", "format": name, "scale_search": search}
    return harness.timed_row(place, harness.timings(variants, REPEATS), per_second=1e3)


def _bitsandbytes(weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    return {
        "bitsandbytes quantize": lambda: functional.quantize_4bit(weight, quant_type="nf4", blocksize=64),
        "bitsandbytes dequantize": lambda: functional.dequantize_4bit(codes, state),
    }
