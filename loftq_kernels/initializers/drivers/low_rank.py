"""Truncated SVD of a batch of matrices, as an orthonormal basis of the dominant right space and its image.

Quantization residuals have flat, noise-like spectra: judge a solver by the energy ||E V||^2 it captures, not vectors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from loftq_kernels import threads

# Decompositions of matrices up to this size run on one thread: they consist of a parallel region per column or two, in
# each of which threads would wait for the last, for a few milliseconds' work in all.
SMALL = 512
COLD_STEPS = 4  # They capture 99% of the optimal energy of a flat spectrum; 2 steps capture 95%.


def warm_steps(short_side: int, bits: int) -> int:
    """Krylov steps from the second alternation on, when the previous basis is already close.

    One is enough at 4 bits or more. At 2 bits an alternation changes more: one step leaves LoftQ's final error at rank
    64 up to 0.23% above the exact solver's (4096x4096, int2), two steps 0.17%. Below 1024 columns two cost nothing, and
    are always taken: at 512 columns one step leaves 0.30%.
    """
    return 2 if short_side < 1024 or bits < 4 else 1


def block_width(rank: int) -> int:
    """Columns of a Krylov block.

    On low-rank matrices with noise, a surplus of 8 columns leaves LoftQ's final error at rank 8 and 16 up to 0.44%
    above the exact solver's; this surplus leaves 0.11%. At rank 64 it lowers 0.22% to 0.07%.
    """
    return rank + max(16, 40 - rank)


def resolve_mode(svd: str, rank: int, short_side: int) -> str:
    """ "auto" takes the exact solver where the block Krylov basis would span the whole space."""
    if svd != "auto":
        return svd
    return "exact" if (COLD_STEPS + 1) * block_width(rank) >= short_side else "fast"


def dominant_space(
    matrix: Tensor, rank: int, *, mode: str, start: Tensor | None, seed: int, warm_steps: int = 1
) -> tuple[Tensor, Tensor]:
    """matrix [B, n, s] with s <= n -> V [B, s, w], orthonormal, and matrix @ V [B, n, w], best direction first.

    w is ``rank`` for mode "exact" and at least ``rank`` for "fast" (the surplus is a better `start` for the next,
    similar matrix). ``matrix @ V_r @ V_r.T`` is the best approximation of rank r: exactly, or nearly for "fast".
    """
    if mode == "exact":
        return _gram_eigh(matrix, rank)
    width = min(block_width(rank), matrix.shape[-1])
    if start is None:
        probe = gaussian(matrix.shape[-2], width, seed, matrix.device).to(matrix.dtype)
        start, steps = matrix.mT @ probe, COLD_STEPS
    else:
        steps = warm_steps
    return _block_krylov(matrix, start, min(steps, matrix.shape[-1] // width - 1))


def _gram_eigh(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the float64 Gram matrix: float32 would rotate vectors across gaps of 1.001."""
    columns = matrix.double()
    basis = _eigh(columns.mT @ columns)[1][..., -rank:].flip(-1).to(matrix.dtype)
    return basis, matrix @ basis


def gaussian(rows: int, width: int, seed: int, device: torch.device) -> Tensor:
    """Float32 [rows, width], the same for every matrix of a batch and device, so that batching changes no result."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float32, device="cpu").to(device)


def _block_krylov(matrix: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Rayleigh-Ritz on span{X, M X, .., M^steps X}, M = matrix^T matrix, X = start [B, s, w] (Musco & Musco, 2015).

    Returns the w leading Ritz vectors and their images; 2 steps + 1 products with the matrix.
    """
    block = _orthonormal(start)
    basis, images = block, matrix @ block
    for _ in range(steps):
        block = matrix.mT @ images[..., -block.shape[-1] :]
        for _ in range(2):  # Twice is enough (Kahan): one pass leaves rounding errors as large as what it removed.
            block = _orthonormal(block - basis @ (basis.mT @ block))
        basis = torch.cat([basis, block], -1)
        images = torch.cat([images, matrix @ block], -1)
    ritz = _eigh((images.mT @ images).double())[1]
    leading = ritz[..., -start.shape[-1] :].flip(-1).to(matrix.dtype)
    return basis @ leading, images @ leading


def _orthonormal(block: Tensor) -> Tensor:
    with _threads_for(block):
        return torch.linalg.qr(block).Q


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    with _threads_for(symmetric):
        return torch.linalg.eigh(symmetric)


def _threads_for(matrix: Tensor) -> AbstractContextManager[None]:
    """One thread where the matrix is small, on a CPU."""
    return threads.own_threads(1) if matrix.is_cpu and matrix.shape[-1] <= SMALL else nullcontext()


def balanced_factors(image: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """image [B, n, r], basis [B, s, r] orthonormal -> U sqrt(S), V sqrt(S) with U S V^T = image @ basis.T its SVD."""
    eigenvalues, rotation = _eigh(image.double().mT @ image.double())
    singular = eigenvalues.flip(-1).clamp(min=0).sqrt()
    rotation = rotation.flip(-1)
    # A direction whose singular value is rounding noise contributes nothing: leave it out rather than divide by it.
    kept = singular > singular[..., :1] * 1e-7
    root = torch.where(kept, singular.sqrt(), 0.0)
    inverse_root = torch.where(kept, 1 / singular.sqrt(), 0.0)
    left = image @ (rotation * inverse_root.unsqueeze(-2)).to(image.dtype)
    right = basis @ (rotation * root.unsqueeze(-2)).to(basis.dtype)
    return left, right


def dominant_left_space(matrix: Tensor, rank: int, *, mode: str, seed: int) -> Tensor:
    """matrix [B, N, K] of any shape -> U [B, N, rank], orthonormal: its leading left singular vectors, best first."""
    if matrix.shape[-2] <= matrix.shape[-1]:
        return dominant_space(matrix.mT, rank, mode=mode, start=None, seed=seed)[0][..., :rank]
    image = dominant_space(matrix, rank, mode=mode, start=None, seed=seed)[1][..., :rank]
    return _orthonormal(image)  # The columns are orthogonal (nearly, for "fast"); this gives them length 1.


def singular_values(matrix: Tensor) -> Tensor:
    """matrix [N, K] -> all of them, descending, float64, by the Gram matrix: below 1e-8 of the first they are noise."""
    short = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).double()
    return torch.linalg.eigvalsh(short @ short.mT).clamp(min=0).sqrt().flip(-1)


def rank_for_energy(singular: Tensor, energy: float, most: int) -> int:
    """singular [s], descending -> the least r whose leading values sum to ``energy`` of all, in 1 .. most."""
    shares = singular.cumsum(0)
    return min(int((shares < energy * shares[-1]).sum()) + 1, most)
