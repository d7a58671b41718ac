"""Gram matrices of a layer's inputs: their factors, and the best low-rank term for a layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

from loftq_kernels import arguments
from loftq_kernels.initializers import parallel
from loftq_kernels.initializers.drivers import low_rank
from loftq_kernels.initializers.options import SVD_MODES
from loftq_kernels.ops import checks


def gram_factor(gram: Tensor, name: str = "gram") -> Tensor:
    """gram S [K, K] -> F [K, K], float64, with F F^T = S: Cholesky's, or Q L^(1/2) of S = Q L Q^T where S is singular.

    Raises ValueError where S has a negative eigenvalue that rounding cannot explain.
    """
    gram = gram.double()
    gram = (gram + gram.T) / 2
    factor, failed_at = torch.linalg.cholesky_ex(gram)
    if failed_at == 0:
        return factor
    values, vectors = torch.linalg.eigh(gram)
    # A float32 Gram matrix rounds each eigenvalue by up to K eps of the largest.
    allowed = 2 * len(gram) * torch.finfo(torch.float32).eps * values[-1].clamp(min=0)
    if values[0] < -allowed:
        raise ValueError(
            f"{name} is no Gram matrix: its eigenvalues are {values[0].item():.3g} .. {values[-1].item():.3g}"
        )
    return vectors * values.clamp(min=0).sqrt()


def weighted_low_rank(
    residual: Tensor, gram: Tensor, rank: int, *, svd: str = "auto", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """residual E [N, K], gram S [K, K] -> L [N, r], R [r, K] that minimise tr((E - L R) S (E - L R)^T)

    For an adapter on top of any compressor: E = W - compressed W, lora_B = L, lora_A = R. L = P D^(1/2) and
    R = D^(1/2) Q^T with P D Q^T the SVD of their product. Float64 inside; results in the dtype of residual (float32 for
    half types). ``svd``: "auto" and "exact" take eigenvectors of (E F)^T (E F) or (E F) (E F)^T, "fast" block Krylov.

    Raises ValueError for shapes that do not agree, a rank outside 1 .. min(N, K), NaN or Inf.
    """
    checks.check_weight("residual", residual)
    checks.check_floating("gram", gram)
    checks.check_same_device("gram", gram, "residual", residual)
    rows, columns = residual.shape
    rank = checks.check_rank(rank, rows, columns)
    if gram.shape != (columns, columns):
        raise ValueError(f"gram has shape {tuple(gram.shape)}, residual {(rows, columns)} needs {(columns, columns)}")
    for name, tensor in (("residual", residual), ("gram", gram)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or Inf")
    mode, shape = resolve_mode(svd), (max(rows, columns), columns)

    def solve(matrix: Tensor) -> tuple[Tensor, Tensor]:
        left = low_rank.dominant_left_space(matrix @ gram_factor(gram), rank, mode=mode, seed=seed)
        return low_rank.balanced_factors(matrix.mT @ left, left)

    with torch.autocast(residual.device.type, enabled=False), torch.inference_mode(False), torch.no_grad():
        division = parallel.divide(1, shape, residual.device, copies=2 * parallel.WORKSPACE_COPIES)
        ((right, left),) = parallel.each(solve, [residual.double()[None]], division)
    dtype = torch.promote_types(residual.dtype, torch.float32)
    return left[0].to(dtype), right[0].mT.contiguous().to(dtype)


def resolve_mode(svd: str) -> str:
    """ "auto" is exact: most time goes into E F and the errors, so "fast" saves only 40% at 2048x2048, rank 64."""
    arguments.choice("svd", svd, SVD_MODES)
    return "exact" if svd == "auto" else svd
