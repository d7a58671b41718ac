"""Times of single kernels, to be compared between commits: ``make bench-compare``.

``pytest bench --benchmark-save=NAME`` keeps a run, ``pytest bench --benchmark-compare`` compares with the last one. The
ratios to other software are measured by ``python -m bench``.
"""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

import loftq_kernels as lk
from bench import ours, peers

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.benchmark(min_rounds=15, max_time=0.7, warmup=True, warmup_iterations=3, disable_gc=True)

SHAPE = (4096, 4096)
ROTATED_BYTES = 64 << 20  # More than most caches hold, prepared within a second.


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(SHAPE) * 0.02


@pytest.mark.parametrize("rows", [1, 8, 128])
@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("format", ["nf4", "nf2"])
def test_qlora_linear(benchmark, format, rank, rows):
    calls = cycle(peers.products(ours.product(format, rank), SHAPE, ROTATED_BYTES, "cpu"))
    x = torch.randn(rows, SHAPE[1]).to(peers.DTYPE)
    y = benchmark(lambda: next(calls)(x))
    assert y.shape == (rows, SHAPE[0])


@pytest.mark.parametrize("format", ["nf4", "nf2"])
def test_grad_input(benchmark, format):
    contender = ours.grad_input(format)
    grad = torch.randn(128, SHAPE[0]).to(peers.DTYPE)
    calls = cycle(peers.products(contender, SHAPE, ROTATED_BYTES, "cpu", grad))
    assert benchmark(lambda: next(calls)(grad)).shape == (128, SHAPE[1])


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_quantize(benchmark, weight, format):
    assert benchmark(lk.quantize, weight, format).shape == SHAPE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantize(benchmark, weight, dtype):
    packed = lk.quantize(weight, "nf4")
    assert benchmark(packed.dequantize, dtype).dtype == dtype


@pytest.mark.parametrize("bits", [4, 2])
def test_pack(benchmark, bits):
    codes = torch.randint(0, 1 << bits, SHAPE, dtype=torch.uint8)
    packed = benchmark(torch.ops.loftq_kernels.pack_codes, codes, bits)
    assert packed.shape == (SHAPE[0], SHAPE[1] * bits // 8)


@pytest.mark.benchmark(min_rounds=5, max_time=2, warmup=False)
def test_loftq_init(benchmark):
    weight = torch.randn(1024, 1024) * 0.02
    assert benchmark(lk.loftq_init, weight, "nf4", rank=16).error < 0.1
