"""The plain-torch backend of the ops on batches of small matrices; csrc/include/loftq/small_matrix.h defines them."""

from __future__ import annotations

import torch
from torch import Tensor

SHIFTS = 8  # The last shift, 4 * 16^7 * epsilon, is above 1 even for a float64 Gram matrix.


def jacobi_eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a [B, n, n], symmetric positive semi-definite -> values [B, n], descending, vectors [B, n, n], info [B] int32.

    info is 0; -1 for a matrix with NaN or Inf, whose results are NaN; 1 where a device's kernel did not converge.
    """
    finite, clean = _finite(a)
    values, vectors = torch.linalg.eigh(clean)
    values, vectors = (_nan_unless(finite, result.flip(-1)) for result in (values, vectors))
    return values, vectors, _info(finite)


def jacobi_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a [B, m, n], m >= n -> u [B, m, n], values [B, n], descending, v [B, n, n], info [B] as of `jacobi_eigh`.

    a = u diag(values) v^T; a column of u is zero where its singular value is zero.
    """
    finite, clean = _finite(a)
    u, values, vh = torch.linalg.svd(clean, full_matrices=False)
    u = torch.where(values.unsqueeze(-2) > 0, u, 0.0)
    u, values, v = (_nan_unless(finite, result) for result in (u, values, vh.mT))
    return u, values, v, _info(finite)


def cholesky_inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """gram [B, b, b] (only the lower triangle is read) -> R^-1 [B, b, b] float32, upper triangular, and info [B].

    gram = R^T R, in float64 on columns scaled to norm 1; while a pivot is at most epsilon, shift * diag(gram) is added,
    shift = 4 epsilon, 64 epsilon, ... info: 0; the number of shifts (at least 1 where a diagonal entry is not
    positive); -1 for NaN or Inf, -2 for not positive definite at any shift: those results are NaN.
    """
    size = gram.shape[-1]
    epsilon = size * torch.finfo(gram.dtype).eps / 2
    finite, lower = _finite(gram.double().tril())
    square = lower.diagonal(dim1=-2, dim2=-1)
    inverse_norm = torch.where(square > 0, square.rsqrt(), 0.0)
    scaled = lower * inverse_norm.unsqueeze(-1) * inverse_norm.unsqueeze(-2)
    info = torch.full_like(finite, -2, dtype=torch.int32)
    inverse = torch.full_like(scaled, torch.nan)
    identity = torch.eye(size, dtype=scaled.dtype, device=scaled.device).expand_as(scaled)
    shift = 0.0
    for shifts in range(SHIFTS + 1):
        scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0 + shift)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        good = (failed == 0) & (factor.diagonal(dim1=-2, dim2=-1).square() > epsilon).all(-1) & (info == -2)
        solved = torch.linalg.solve_triangular(factor, identity, upper=False)
        inverse = torch.where(good[:, None, None], solved, inverse)
        info = torch.where(good, shifts, info)
        shift = 16.0 * shift if shift else 4.0 * epsilon
    info = torch.where((info == 0) & (square <= 0).any(-1), 1, info)
    info = torch.where(finite, info, -1)
    r_inverse = (inverse.mT * inverse_norm.unsqueeze(-1)).triu()
    return _nan_unless(info >= 0, r_inverse).float(), info


def _finite(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Which matrices [B] of a batch are finite, and the batch with zeros in place of the others."""
    finite = torch.isfinite(matrices).all(-1).all(-1)
    return finite, torch.where(finite[:, None, None], matrices, 0.0)


def _nan_unless(good: Tensor, results: Tensor) -> Tensor:
    return torch.where(good.view(-1, *(1,) * (results.dim() - 1)), results, torch.nan).contiguous()


def _info(finite: Tensor) -> Tensor:
    return finite.int() - 1
