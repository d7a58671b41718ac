"""Batches of small matrices on a CUDA device: our Jacobi eigensolver and Cholesky-inverse against ATen's.

The sizes the LoftQ initializer has at rank 64 are among them: eigenproblems of 400 and 160, blocks of 80 columns. Times
are of whole calls, host included, from idle to idle; every result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import harness
from bench.subject import Subject

SUBJECT = Subject(takes="2 min of a GPU", quick="1 min of a GPU", gpu=True, nvcc=True)
EIGH_SIZES = (16, 32, 64, 80, 160, 240, 320, 400, 480)
BLOCK_WIDTHS = (16, 40, 64, 80, 128)  # The Cholesky kernel holds these on GPUs with 99 KiB of shared memory or more.
BLOCK_ROWS = 4096
BATCHES = (1, 4, 16, 64, 256)

_ops = torch.ops.loftq_kernels


def run(output: Path, *, quick: bool) -> None:
    """The file is written after each size: the device's time may be up any moment."""
    path = harness.result_file(output, "small_matrix", quick=quick)
    batches = BATCHES[:3] if quick else BATCHES
    eigen: list[dict] = []
    blocks: list[dict] = []
    results = {"milliseconds": {"eigh, float32": eigen, "orthonormal columns": blocks}}
    for size in harness.progress(EIGH_SIZES[:: 3 if quick else 1], lambda size: f"eigh of {size}"):
        eigen += [eigh(batch, size, "cuda") for batch in batches]
        harness.write_json(path, results)
    harness.print_table(eigen)
    for width in harness.progress(BLOCK_WIDTHS, lambda width: f"{width} orthonormal columns"):
        blocks += [orthonormal(batch, BLOCK_ROWS, width, "cuda") for batch in batches]
        harness.write_json(path, results)
    harness.print_table(blocks)


def eigh(batch: int, size: int, device: str) -> dict:
    """Eigenvectors of Gram matrices with a flat spectrum, as of quantization residuals, in float32."""
    root = torch.randn(batch, 4 * size, size, generator=torch.Generator().manual_seed(0)).to(device)
    gram = root.mT @ root
    variants = {
        "ours": lambda: _ops.jacobi_eigh(gram)[:2],
        "torch.linalg.eigh": lambda: torch.linalg.eigh(gram),
    }
    for name, solve in variants.items():
        values, vectors = solve()
        _check(name, (gram @ vectors - vectors * values.unsqueeze(-2)).abs().max() / values.max(), size)
    return _milliseconds({"n": size, "batch": batch}, variants)


def orthonormal(batch: int, rows: int, width: int, device: str) -> dict:
    """Orthonormal columns of [batch, rows, width] float32, by three ways: then R^-1 alone.

    The ways are CholeskyQR2 with our R^-1, with ATen's in float64 as in the initializer, and Householder QR.
    """
    block = torch.randn(batch, rows, width, generator=torch.Generator().manual_seed(0)).to(device)
    gram = block.mT @ block
    variants = {
        "CholeskyQR2, ours": lambda: _cholesky_qr2(block, _inverse_ours),
        "CholeskyQR2, ATen": lambda: _cholesky_qr2(block, _inverse_aten),
        "torch.linalg.qr": lambda: torch.linalg.qr(block).Q,
        "R^-1, ours": lambda: block @ _inverse_ours(gram),
        "R^-1, ATen": lambda: block @ _inverse_aten(gram),
    }
    identity = torch.eye(width, device=device)
    for name, solve in variants.items():
        q = solve()
        _check(name, (q.mT @ q - identity).abs().max(), width)
    variants |= {"R^-1, ours": lambda: _inverse_ours(gram), "R^-1, ATen": lambda: _inverse_aten(gram)}
    return _milliseconds({"columns": width, "batch": batch}, variants)


def _cholesky_qr2(block: Tensor, inverse: Callable[[Tensor], Tensor]) -> Tensor:
    for _ in range(2):
        block = block @ inverse(block.mT @ block)
    return block


def _inverse_ours(gram: Tensor) -> Tensor:
    return _ops.cholesky_inverse_factor(gram)[0]


def _inverse_aten(gram: Tensor) -> Tensor:
    factor = torch.linalg.cholesky_ex(gram.double(), upper=True).L
    identity = torch.eye(gram.shape[-1], dtype=factor.dtype, device=gram.device).expand_as(factor)
    return torch.linalg.solve_triangular(factor, identity, upper=True).float()


def _check(name: str, error: Tensor, size: int) -> None:
    limit = 32 * size**0.5 * torch.finfo(torch.float32).eps
    if not error <= limit:
        raise AssertionError(f"{name} at size {size}: error {error:.3g} is above {limit:.3g}")


def _milliseconds(place: dict[str, int], variants: dict[str, Callable]) -> dict:
    def timed(solve: Callable) -> Callable:
        def call() -> None:
            solve()
            torch.cuda.synchronize()

        return call

    times = harness.timings({name: timed(solve) for name, solve in variants.items()}, repeats=10)
    return harness.timed_row(place, times, per_second=1e3)
