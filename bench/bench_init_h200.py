"""The LoftQ initializer on an H200: an estimate, not a measurement. Llama-2-7B's 224 matrices, nf4, r=64, T=5.

Bytes and FLOPs of the driver's steps (csrc/loftq) over published rates at stated efficiencies, published times of
batched eigenproblems, and what the host spends on operators and waits, counted by running the driver on a CPU.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness
from bench.bench_init import LLAMA_LAYER
from bench.subject import Subject
from loftq_kernels.formats import get_format
from loftq_kernels.initializers import engine, parallel
from loftq_kernels.initializers.drivers import low_rank
from loftq_kernels.initializers.options import SolverOptions
from loftq_kernels.models import select

SUBJECT = Subject(takes="5 s", quick="the same")
LAYERS, RANK, NUM_ITER = 32, 64, 5
MEMORY = 141e9  # Bytes. This and the rates below are from NVIDIA's H200 SXM data sheet.
BANDWIDTH = 4.8e12
RATES = {"bfloat16": 989e12, "float32": 67e12}  # FLOP/s, dense; float32 without tensor cores.
# Assumptions, none of them measured on an H200.
REACHED_BANDWIDTH, REACHED_RATE = 0.7, 0.5  # Shares of those rates.
OPERATOR_SECONDS, WAIT_SECONDS = 10e-6, 20e-6  # Host time to enqueue one; to notice that the device is done.
CHOLESKY_SECONDS = 0.5e-3  # Per batch of float64 Cholesky factors and inverses of 80 x 80, whatever its size.
# Seconds of torch.linalg.eigh for 64 matrices at a time on an RTX 4080, https://github.com/pytorch/pytorch/issues/175585
# (the second figure: torch before 2.12, which solves them one after another). Cold: 400 x 400 float32; warm, 160 x 160:
# no more than 256 x 256, and for the second figure no less than 128 x 128; last: 64 x 64 float64.
EIGH_SECONDS = {"cold": (31.3e-3, 587.1e-3), "warm": (6.36e-3, 137.5e-3), "last": (2.61e-3, 117.5e-3)}


def run(output: Path, *, quick: bool) -> None:
    parts = estimate()
    harness.print_table(parts)
    looped = eigh_seconds(0, looped=True)
    print(f"torch before 2.12: at least {looped:.2f} s for the eigenproblems alone")
    unsure = sum(row["seconds"] for row in parts if row["part"].startswith(("eigenproblems", "Cholesky", "host")))
    pessimistic = parts[-1]["seconds"] + 2 * unsure
    by_layers = estimate(select._LAYERS_PER_BATCH)[-1]["seconds"]
    print(f"quantize_model, {select._LAYERS_PER_BATCH} layers at a time: {by_layers:.2f} s in all")
    print(f"eigenproblems, Cholesky and host three times that: {pessimistic:.2f} s in all")
    harness.write_json(
        harness.result_file(output, "init_h200", quick=quick),
        {
            "spread": "none: an estimate, nothing was timed",
            "H200 estimate, not measured": parts,
            f"sum for quantize_model, {select._LAYERS_PER_BATCH} layers at a time, seconds": by_layers,
            "sum with eigenproblems, Cholesky and host three times that, seconds": pessimistic,
            "eigenproblems with torch before 2.12, at least, seconds": looped,
        },
    )


def estimate(at_most: float = math.inf) -> list[dict]:
    """One row per part of the work, and their sum: nothing is assumed to overlap.

    At most ``at_most`` matrices go to the driver together.
    """
    calls = batches(at_most)
    shapes = [shape for shape, count in LLAMA_LAYER.items() for _ in range(count * LAYERS)]
    weights = sum(rows * columns for rows, columns in shapes)
    long = sum(max(shape) for shape in shapes)
    short = sum(min(shape) for shape in shapes)
    width = low_rank.block_width(RANK)
    steps = [low_rank.COLD_STEPS] + [low_rank.warm_steps(4096, 4)] * (NUM_ITER - 1)
    passes = 1 + sum(2 * step + 1 for step in steps)  # The first one multiplies the random start.
    blocks = sum(2 * step + 1 for step in steps)  # Blocks that are orthonormalised.
    pairs = sum(step * (step + 1) // 2 for step in steps)  # Pairs of a new block and one that it is made orthogonal to.
    spaces = [step + 1 for step in steps]  # Their sizes in blocks.

    # Float32 weights, bfloat16 residuals, half a byte per code and 2 / 64 bytes of scale per weight.
    rows = [
        _streamed("quantize, residual", NUM_ITER * (4 + 2 + 2 + 0.5 + 2 / 64) * weights),
        _streamed("low-rank term", (NUM_ITER - 1) * 2 * weights, (NUM_ITER - 1) * 2 * RANK * weights, "bfloat16"),
        _streamed("products with the residual", passes * 2 * weights, passes * 2 * width * weights, "bfloat16"),
        # Each round takes a Gram matrix and a product with R^-1, 2 s w^2 each; each pair two passes of two products.
        _streamed(
            "orthonormal blocks",
            blocks * 2 * 16 * short * width + pairs * 2 * 8 * short * width,
            blocks * 2 * 4 * short * width**2 + pairs * 2 * 4 * short * width**2,
            "float32",
        ),
        # Gram matrix of the image, and the leading vectors of basis and image.
        _streamed(
            "Rayleigh-Ritz",
            sum(4 * (2 * space * long + space * short) * width for space in spaces),
            sum(2 * (space**2 * long + space * (long + short)) * width**2 for space in spaces),
            "float32",
        ),
        # Range twice, norm by way of float64; then dequantize, subtract, image, less the factors' product, norm.
        _streamed(
            "norms, factors, final error",
            ((4 + 4) + (4 + 8 + 8) + (0.5 + 4) + (4 + 4 + 4) + 4 + (4 + 4) + (4 + 8 + 8)) * weights,
            2 * 2 * RANK * weights,
            "float32",
        ),
        {"part": "eigenproblems", "GB": "", "TFLOP": "", "seconds": eigh_seconds(calls, looped=False)},
        {"part": "Cholesky", "GB": "", "TFLOP": "", "seconds": 2 * blocks * calls * CHOLESKY_SECONDS},
        *_host(len(shapes), calls),
    ]
    return [*rows, {"part": "sum", "GB": "", "TFLOP": "", "seconds": sum(row["seconds"] for row in rows)}]


def _streamed(part: str, size: float, flops: float = 0.0, dtype: str = "float32") -> dict:
    """Bytes or FLOPs, whichever takes longer."""
    seconds = max(size / (BANDWIDTH * REACHED_BANDWIDTH), flops / (RATES[dtype] * REACHED_RATE))
    return {"part": part, "GB": size / 1e9, "TFLOP": flops / 1e12, "seconds": seconds}


def batches(at_most: float) -> int:
    """How often the driver is called, with as many matrices at a time as a quarter of the memory holds."""
    sizes = {s: min(at_most, MEMORY / 4 // (parallel.WORKSPACE_COPIES * 4 * math.prod(s))) for s in LLAMA_LAYER}
    return sum(math.ceil(count * LAYERS / sizes[shape]) for shape, count in LLAMA_LAYER.items())


def eigh_seconds(batches: int, *, looped: bool) -> float:
    """The published time of 64 matrices for each call, whose batch has at most 65, or for matrices one by one."""
    cold, warm, last = (EIGH_SECONDS[which][looped] for which in ("cold", "warm", "last"))
    calls = LAYERS * sum(LLAMA_LAYER.values()) / 64 if looped else batches
    return calls * (cold + (NUM_ITER - 1) * warm + last)


def _host(matrices: int, calls: int) -> list[dict]:
    two, three = (_count(batch) for batch in (2, 3))
    rows = []
    for i, (part, seconds) in enumerate((("operators", OPERATOR_SECONDS), ("waits", WAIT_SECONDS))):
        each = three[i] - two[i]
        total = calls * (two[i] - 2 * each) + matrices * each
        rows.append({"part": f"host: {total} {part}", "GB": "", "TFLOP": "", "seconds": total * seconds})
    return rows


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in operator._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):  # A view costs next to nothing.
            self.calls[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


def _count(batch: int) -> tuple[int, int]:
    """Operators, and waits for results, of one batch on a CPU. A GPU has fewer: there norms are not taken by blocks of
    rows, and some of these results are on the host already."""
    options = SolverOptions(
        format=get_format("nf4"),
        rank=RANK,
        num_iter=NUM_ITER,
        group_size=64,
        scaling=1.0,
        mode="fast",
        warm_steps=low_rank.warm_steps(4096, 4),
        order="quantize_first",
        scale_dtype=torch.float16,
        scale_search=False,
        seed=0,
    )
    weights = [torch.randn(1024, 1024) for _ in range(batch)]
    with _Operators() as operators:
        engine._run(weights, [f"weights[{i}]" for i in range(batch)], options, None)
    return operators.calls.total(), operators.calls["aten::_local_scalar_dense"]
