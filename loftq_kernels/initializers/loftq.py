"""LoftQ (Li et al., ICLR 2024): alternate quantization and truncated SVD so that Q + s B A starts close to W."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loftq_kernels.formats import Format, PackedTensor, get_format
from loftq_kernels.initializers import low_rank
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.ops import checks
from loftq_kernels.ops.functional import check_finite, check_scales, kernel_dtype

ORDERS = ("quantize_first", "svd_first")
WORKSPACE_BYTES = 1 << 30  # matrices go through the solver in chunks whose float32 working set stays below this


def loftq_init(
    weight: Tensor,
    format: str = "nf4",
    rank: int = 16,
    num_iter: int = 5,
    *,
    group_size: int = 64,
    scaling: float = 1.0,
    svd: str = "auto",
    order: str = "quantize_first",
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> AdapterInit:
    """Choose Q and the adapter together: minimise ||W - Q - scaling * lora_B @ lora_A||_F over alternations

        Q_t = quantize(W - s B_{t-1} A_{t-1});     s B_t A_t = SVD_r(W - Q_t);     B_0 A_0 = 0

    and return the best iterate (they are not monotone), U sqrt(S) and sqrt(S) V^T each divided by sqrt(scaling).

    Args:
        weight: [N, K], floating point.
        format, group_size, scale_dtype, scale_search: as for `quantize`.
        rank: 1 .. min(N, K).
        num_iter: alternations T >= 1; T = 1 is the SVD of the plain quantization residual.
        scaling: what the module multiplies lora_B @ lora_A by, lora_alpha / r; > 0.
        svd: "exact" (float64 Gram matrix and eigh), "fast" (block Krylov, then warm-started; final error within 0.3%
            of exact on every matrix of the test suite) or "auto" (fast unless the matrix is small).
        order: "quantize_first" as above, or "svd_first", which takes the SVD of W - Q_{t-1} first (Q_0 = 0).
        seed: of the random start of "fast"; the same seed gives the same result.
        device: where to compute; the result is on the device of weight.

    Raises ValueError for arguments out of range, NaN or Inf in weight and scales that do not fit scale_dtype.
    """
    return loftq_init_batch(
        [weight],
        format,
        rank,
        num_iter,
        group_size=group_size,
        scaling=scaling,
        svd=svd,
        order=order,
        scale_dtype=scale_dtype,
        scale_search=scale_search,
        seed=seed,
        device=device,
    )[0]


def loftq_init_batch(
    weights: Sequence[Tensor] | Tensor,
    format: str = "nf4",
    rank: int = 16,
    num_iter: int = 5,
    *,
    group_size: int = 64,
    scaling: float = 1.0,
    svd: str = "auto",
    order: str = "quantize_first",
    scale_dtype: torch.dtype = torch.float16,
    scale_search: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
    names: Sequence[str] | None = None,
) -> list[AdapterInit]:
    """`loftq_init` for same-shape matrices: a sequence of [N, K] or one [B, N, K]. Results do not depend on batching.

    ``progress(n)`` is called whenever n more matrices are done. Raises as `loftq_init`, with the matrix's entry in
    ``names`` (default "weights[i]"), and ValueError for mixed shapes, dtypes or devices. An empty batch gives an empty
    list.
    """
    weights = list(weights)
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else list(names)
    if not weights:
        return []
    fmt = get_format(format)
    _check_batch(weights, names, rank, num_iter, scaling, order)
    codebook = fmt.codebook(weights[0].device)
    checks.check_quantize(weights[0], codebook, group_size, fmt.scale_rule, scale_dtype, scale_search)
    rows, columns = weights[0].shape
    mode = low_rank.resolve_mode(svd, rank, min(rows, columns))
    chunk = max(1, WORKSPACE_BYTES // (4 * 4 * rows * columns))
    target = torch.device(device) if device is not None else weights[0].device
    results: list[AdapterInit] = []
    for first in range(0, len(weights), chunk):
        state = _Alternation(
            [kernel_dtype(weight.detach()).to(target) for weight in weights[first : first + chunk]],
            fmt,
            rank,
            group_size=group_size,
            mode=mode,
            scale_dtype=scale_dtype,
            scale_search=scale_search,
            seed=seed,
            names=names[first : first + chunk],
        )
        for _ in range(num_iter):
            state.step(order)
        results += state.results(scaling, weights[0].device)
        if progress is not None:
            progress(len(state.weights))
    return results


def _check_batch(
    weights: list[Tensor], names: list[str], rank: int, num_iter: int, scaling: float, order: str
) -> None:
    for name, weight in zip(names, weights, strict=True):
        checks.check_weight(name, weight)
        for what in ("shape", "dtype", "device"):
            mine, first = getattr(weight, what), getattr(weights[0], what)
            if mine != first:
                raise ValueError(f"a batch must agree in {what}: {name} has {mine}, {names[0]} has {first}")
    checks.check_rank(rank, *weights[0].shape)
    if isinstance(num_iter, bool) or not isinstance(num_iter, int) or num_iter < 1:
        raise ValueError(f"num_iter={num_iter!r} must be an integer >= 1")
    if not (isinstance(scaling, int | float) and math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"scaling={scaling!r} must be a finite number > 0")
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {ORDERS}")


class _Alternation:
    """LoftQ's state for a batch of matrices; keeps one float32 residual a matrix.

    The low-rank term of a matrix E is held as V, an orthonormal basis on its shorter side, and E V. Then
    ||E - E V V^T||^2 = ||E||^2 - ||E V||^2, so an adapter never makes the error worse than none.
    """

    def __init__(
        self,
        weights: list[Tensor],
        fmt: Format,
        rank: int,
        *,
        group_size: int,
        mode: str,
        scale_dtype: torch.dtype,
        scale_search: bool,
        seed: int,
        names: list[str],
    ):
        self.weights, self.fmt, self.rank, self.group_size = weights, fmt, rank, group_size
        self.mode, self.scale_dtype, self.scale_search, self.seed = mode, scale_dtype, scale_search, seed
        self.names = names
        shape = len(weights), *weights[0].shape
        self.wide = shape[2] > shape[1]
        self.codebook = fmt.codebook(weights[0].device)
        # Residuals are divided by a power of two, which is exact, so that 1e30 or 1e-30 weights have float32 squares.
        self.unit = [_power_of_two_below(weight, name) for weight, name in zip(weights, names, strict=True)]
        self.norms = [
            torch.linalg.vector_norm(weight, dtype=torch.float64).item() / unit
            for weight, unit in zip(weights, self.unit, strict=True)
        ]
        self.residual = torch.zeros(shape, dtype=torch.float32, device=weights[0].device)  # also holds the low-rank term
        self.packed: list[PackedTensor | None] = [None] * len(weights)
        self.basis: Tensor | None = None  # [B, short, >= r], the last right space
        self.image: Tensor | None = None  # [B, long, r], E V for the first r directions
        self.errors: list[list[float]] = [[] for _ in weights]
        self.best: list[tuple[PackedTensor, Tensor, Tensor] | None] = [None] * len(weights)

    def step(self, order: str) -> None:
        """One alternation; see `loftq_init`."""
        if order == "quantize_first":
            if self.image is not None:
                self._write_low_rank()
            residual_norm2 = self._quantize()
            self._solve()
            captured = self.image.double().square().sum((1, 2)).tolist()
            remaining = [whole - part for whole, part in zip(residual_norm2, captured, strict=True)]
        else:
            if self.image is None:
                for weight, unit, residual in zip(self.weights, self.unit, self.residual, strict=True):
                    residual.copy_(weight).div_(unit)
            self._solve()
            self._write_low_rank()
            low_rank_term = self.residual.clone()
            self._quantize()
            remaining = (self.residual - low_rank_term).double().square().sum((1, 2)).tolist()
        self._keep_best(remaining)

    def _quantize(self) -> list[float]:
        """residual <- W - quantize(W - low-rank term) in units of `unit`; returns its squared norms."""
        norms = []
        for i, (weight, unit, residual) in enumerate(zip(self.weights, self.unit, self.residual, strict=True)):
            codes, scale, offset, norm2 = torch.ops.loftq_kernels.quantize_residual_(
                weight,
                residual.mul_(unit),
                self.codebook,
                self.group_size,
                self.fmt.scale_rule,
                self.scale_dtype,
                self.scale_search,
            )
            offset = offset if self.fmt.affine else None
            check_scales(weight, scale, offset, self.group_size, name=self.names[i])
            residual.div_(unit)
            norms.append(norm2.item() / unit**2)
            self.packed[i] = PackedTensor(
                codes,
                scale,
                offset,
                self.codebook,
                in_features=weight.shape[1],
                group_size=self.group_size,
                format=self.fmt,
            )
        return norms

    def _solve(self) -> None:
        """Basis and image from the residual."""
        matrix = self.residual.mT if self.wide else self.residual
        self.basis, image = low_rank.dominant_space(
            matrix, self.rank, mode=self.mode, start=self.basis, seed=self.seed
        )
        self.image = image[..., : self.rank]

    def _write_low_rank(self) -> None:
        """residual <- the low-rank term E V V^T."""
        left, right = self.image, self.basis[..., : self.rank]
        if self.wide:
            left, right = right, left
        torch.matmul(left, right.mT, out=self.residual)

    def _keep_best(self, remaining: list[float]) -> None:
        for i, left in enumerate(remaining):
            error = math.sqrt(max(left, 0.0)) / self.norms[i] if self.norms[i] > 0 else 0.0
            if not self.errors[i] or error < min(self.errors[i]):
                self.best[i] = (self.packed[i], self.image[i].clone(), self.basis[i, :, : self.rank].clone())
            self.errors[i].append(error)

    def results(self, scaling: float, device: torch.device) -> list[AdapterInit]:
        """The best iterates, their factors split evenly and divided by sqrt(scaling)."""
        images = torch.stack([image for _, image, _ in self.best])
        bases = torch.stack([basis for _, _, basis in self.best])
        long, short = low_rank.balanced_factors(images, bases)
        left, right = (short, long) if self.wide else (long, short)
        results = []
        for i, (packed, _, _) in enumerate(self.best):
            root = math.sqrt(self.unit[i] / scaling)
            results.append(
                AdapterInit(
                    packed=packed.to(device),
                    lora_A=(right[i].mT * root).contiguous().to(device),
                    lora_B=(left[i] * root).contiguous().to(device),
                    scaling=scaling,
                    error=min(self.errors[i]),
                    errors=self.errors[i],
                )
            )
        return results


def _power_of_two_below(weight: Tensor, name: str) -> float:
    largest = weight.abs().max().item()
    if not math.isfinite(largest):
        check_finite(weight, name)
    return 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
