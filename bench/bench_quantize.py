"""Quantize and dequantize one weight: our kernels against the plain-torch reference and bitsandbytes, same bytes."""

from __future__ import annotations

from pathlib import Path

import torch

import loftq_kernels as lk
from bench import harness


def run(output: Path, *, quick: bool) -> None:
    rows, columns = (1024, 1024) if quick else (4096, 4096)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    results = [_one(weight, name, search) for name in lk.format_names() for search in (False, True)]
    harness.print_table(results)
    bandwidth = harness.read_bandwidth()
    print(
        f"read bandwidth {bandwidth / 1e9:.1f} GB/s; the float32 weight takes {weight.nbytes / bandwidth * 1e3:.2f} ms"
    )
    harness.write_json(
        output / "quantize.json", {"shape": [rows, columns], "read_bandwidth": bandwidth, "milliseconds": results}
    )


def _one(weight: torch.Tensor, name: str, search: bool) -> dict:
    """One row of milliseconds; the columns of peers stay empty where they lack the format."""
    packed = lk.quantize(weight, name, scale_search=search)
    variants = {
        "quantize": lambda: lk.quantize(weight, name, scale_search=search),
        "dequantize": lambda: packed.dequantize(),
        "dequantize bf16": lambda: packed.dequantize(torch.bfloat16),
    }
    if not search:
        variants["reference quantize"] = lambda: lk.quantize(weight, name, backend="reference")
        variants["reference dequantize"] = lambda: packed.dequantize(backend="reference")
    if name == "nf4" and not search:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        variants["bitsandbytes quantize"] = lambda: functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        variants["bitsandbytes dequantize"] = lambda: functional.dequantize_4bit(codes, state)
    seconds = harness.interleaved(variants, repeats=5)
    columns = ("quantize", "dequantize", "dequantize bf16", "reference quantize", "reference dequantize")
    columns += ("bitsandbytes quantize", "bitsandbytes dequantize")
    milliseconds = {column: seconds[column] * 1e3 if column in seconds else "" for column in columns}
    return {"format": name, "scale_search": search, **milliseconds}
