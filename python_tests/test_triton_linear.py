"""The Triton decode kernel against float64: interpreted in a process of its own, and on a GPU if there is one.

Interpreted it decodes by plain Triton here; test_triton_kernels.py runs the PTX as well, test_triton_asm.py it alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreted import decode_linear_case

import loftq_kernels as lk

FORMATS = lk.format_names()
GROUPS = (32, 64, 128, 256, -1)

# K: a tail of a tile, of a step and of a group; N: a tail of a block of rows; M: two blocks of rows; more than 512
# columns: x A^T in several chunks.
CASES: dict[str, dict] = {
    **{f"{name}": dict(format=name, M=3, N=40, K=200) for name in FORMATS},
    **{
        f"{name} by {group}": dict(format=name, M=2, N=33, K=330, group_size=group, tiles=4, seed=group)
        for name, group in zip(
            ("nf4", "int2", "uniform4", "int8", "nf2", "int4", "uniform2"), GROUPS + (32, -1), strict=True
        )
    },
    "one by one": dict(format="nf4", M=1, N=1, K=1),
    "whole steps": dict(format="int4", M=1, N=32, K=256, tiles=2),
    "scales by four": dict(format="int2", M=2, N=33, K=480, tiles=4),
    "scales by four, bfloat16": dict(format="int4", M=2, N=33, K=250, group_size=32, tiles=2, scale_dtype="bfloat16"),
    "half": dict(format="int4", M=2, N=40, K=200, dtype="float16"),
    "float32 scales": dict(format="int4", M=2, N=40, K=200, scale_dtype="float32"),
    "two blocks of rows": dict(format="nf4", M=18, N=32, K=64),
    "split": dict(format="int4", M=2, N=40, K=400, splits=4),
    "empty splits": dict(format="nf4", M=2, N=40, K=64, splits=4),
    "bias": dict(format="nf4", M=2, N=40, K=64, bias=True),
    "rank 1": dict(format="nf4", M=3, N=40, K=100, rank=1),
    "rank 40, in chunks": dict(format="int2", M=3, N=40, K=600, rank=40, bias=True),
    "adapter and splits": dict(format="nf4", M=3, N=40, K=600, rank=5, splits=2),
    "adapters": dict(format="nf4", M=9, N=40, K=100, rank=3, adapters=4, bias=True),
    "adapters and splits": dict(format="nf2", M=18, N=40, K=600, rank=20, adapters=3, splits=2),
    **{f"{name} in bfloat16": dict(format=name, M=2, N=40, K=200, dtype="bfloat16") for name in FORMATS},
    "bfloat16 adapter": dict(format="int4", M=3, N=40, K=600, rank=20, splits=2, bias=True, dtype="bfloat16"),
    "bfloat16 adapters": dict(format="nf4", M=9, N=40, K=100, rank=3, adapters=4, dtype="bfloat16"),
    # Adapters of other dtypes than x: one for all rows and several, in splits and not.
    "float32 adapter": dict(
        format="int4", M=3, N=40, K=600, rank=20, splits=2, dtype="bfloat16", adapter_dtypes=("float32", "float32")
    ),
    "float32 adapters": dict(
        format="nf4", M=9, N=40, K=100, rank=3, adapters=4, dtype="float16", adapter_dtypes=("float32", "float32")
    ),
    "narrow adapter": dict(format="nf4", M=3, N=40, K=300, rank=17, adapter_dtypes=("bfloat16", "float16")),
    "mixed adapters": dict(
        format="int8", M=10, N=33, K=330, rank=17, adapters=3, dtype="bfloat16", adapter_dtypes=("float32", "float16")
    ),
}
# Programs run in an order that no device has shown: those that run first have to compute x A^T.
REVERSED = {
    "reversed adapter": dict(format="int2", M=3, N=70, K=1100, rank=40, bias=True),
    "reversed adapters and splits": dict(format="nf2", M=18, N=70, K=1100, rank=20, adapters=3, splits=2),
}


def within_budget(result: dict[str, float], case: dict) -> bool:
    """At most 1.2 times plain torch's error, plus an allowance: correcting codes by sums of x costs a few last bits."""
    allowance = 1e-6 if case.get("dtype", "float32") == "float32" else 1e-5
    return result["error"] <= 1.2 * result["plain"] + allowance


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """All cases, in one process: Triton decides whether to interpret when a kernel is decorated."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_interpreted.py"))],
        input=json.dumps([*CASES.values(), *(case | {"reversed": True} for case in REVERSED.values())]),
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip([*CASES, *REVERSED], json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", [*CASES, *REVERSED])
def test_interpreted(name, interpreted):
    assert within_budget(interpreted[name], {**CASES, **REVERSED}[name]), interpreted[name]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name, dtype):
    case = {**CASES[name], "dtype": dtype}
    assert within_budget(decode_linear_case("cuda", **case), case)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_large_on_gpu(format, dtype):
    """Shapes of the table's configurations, every block of counters used again and again."""
    for seed, rows in enumerate((1, 8, 16)):
        case = dict(format=format, M=rows, N=4096, K=4096, dtype=dtype, rank=16, bias=True, tiles=4, seed=seed)
        for splits in (1, 4):
            assert within_budget(decode_linear_case("cuda", **case, splits=splits), case)


@pytest.mark.gpu
def test_adapter_out_of_range_on_gpu():
    """Its row is NaN, the others are right."""
    from loftq_kernels.triton_kernels.decode_launch import decode_linear

    packed = lk.quantize(torch.randn(64, 128), backend="reference").to("cuda")
    stored = packed.codes, packed.scale, packed.offset, packed.codebook
    x = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16)
    lora_A, lora_B = x.new_ones(2, 4, 128), x.new_ones(2, 64, 4)
    y = decode_linear(x, *stored, 64, lora_A, lora_B, torch.tensor([0, 2, -1], device="cuda"))
    assert y.isnan().all(1).tolist() == [False, True, False]
