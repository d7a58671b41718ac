"""Quantization and low-rank terms that minimise the error of a layer's output instead of that of its weight.

Over calibration tokens X [n, K] with Gram matrix S = X^T X / n = F F^T, a residual E [N, K] costs

    ||X E^T||_F^2 / n = tr(E S E^T) = ||E F||_F^2

and its best approximation of rank r is U U^T E, with U [N, r] the leading left singular vectors of E F: the truncated
SVD of E F, U U^T E F, divided by F without ever forming an inverse. So S may be singular (fewer tokens than channels,
dead channels) and needs no damping. EoRA (Liu et al., 2024, arXiv 2410.21271) and ASER (Zhao et al., AAAI 2025,
arXiv 2411.07762) state the same product with inverses of an eigenvalue or Cholesky factor.

Everything runs in float64: spectra of E F are steep, and squaring them in float32 loses what lies below 3e-4.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_kernels.formats import PackedTensor
from loftq_kernels.initializers import parallel
from loftq_kernels.initializers.drivers import low_rank
from loftq_kernels.initializers.drivers.gram import gram_factor
from loftq_kernels.initializers.options import SolverOptions
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics
from loftq_kernels.ops import reference


class FactorCache:
    """Factors of the last Gram matrices, as many as there are threads: q, k and v come one after the other and share
    theirs, which one of the threads computes while the others wait."""

    def __init__(self, capacity: int = 1):
        self._capacity = capacity
        self._kept: dict[int, _Factor] = {}  # by the id of the Gram matrix, which is kept alive; the oldest first
        self._looking = threading.Lock()

    def get(self, gram: Tensor, device: torch.device, name: str) -> Tensor:
        with self._looking:
            kept = self._kept.pop(id(gram), None)
            while len(self._kept) >= self._capacity:  # Drop an old factor first, so that both never exist at once.
                del self._kept[next(iter(self._kept))]
            self._kept[id(gram)] = kept = kept or _Factor(gram)
        with kept.computing:
            if kept.factor is None:
                kept.factor = gram_factor(gram.to(device), f"gram of {name}")
            return kept.factor


class _Factor:
    def __init__(self, gram: Tensor):
        self.gram = gram
        self.factor: Tensor | None = None
        self.computing = threading.Lock()


@dataclass(frozen=True)
class Calibration:
    """What `run` needs beside weights and options, one entry per weight."""

    statistics: Sequence[InputStatistics]
    names: Sequence[str]
    packed: Sequence[PackedTensor] | None  # weights that are quantized already and are kept
    left_out: Sequence[Tensor] | None  # columns [n], int64, that Q does without: the low-rank term holds them whole
    cache: FactorCache


def run(
    weights: list[Tensor], options: SolverOptions, calibration: Calibration, *, backend: str | None
) -> list[AdapterInit]:
    """LoftQ's alternation with weighted errors, for same-shape weights on one device.

    A matrix with a scale that does not fit its dtype stays at its best iterate, as in `plain.run`; if there is none,
    that scale is non-finite in the result.
    """
    statistics, device = calibration.statistics, weights[0].device
    pairs = zip(statistics, calibration.names, strict=True)
    factors = [calibration.cache.get(own.gram, device, name) for own, name in pairs]
    alternation = WeightedAlternation(weights, factors, options, backend)
    if calibration.packed is not None:
        alternation.residual_of(calibration.packed)
        alternation.approximate()
        return alternation.results()
    if calibration.left_out is not None:
        alternation.left_out = list(calibration.left_out)
    for _ in range(options.num_iter):
        parallel.poll()
        if not alternation.step():
            break
    return alternation.results()


class WeightedAlternation:
    """State for a batch of B matrices; tensors are float64. The low-rank term is held as U and E^T U."""

    def __init__(
        self,
        weights: list[Tensor],
        factors: list[Tensor],
        options: SolverOptions,
        backend: str | None,
    ):
        self.options = options
        self.weight = torch.stack([weight.double() for weight in weights])  # [B, N, K]
        self.factors = factors  # B matrices [K, K]; some may be the same tensor.
        self.codebook = options.format.codebook(weights[0].device)
        self.quantize_op = reference.quantize if backend == "reference" else torch.ops.loftq_kernels.quantize
        self.norms = _norms(self.weight)
        self.weighted_norms = _norms(self.times_factor(self.weight))
        self.left_out: list[Tensor | None] = [None] * len(weights)
        self.frozen = [False] * len(weights)  # True once scales of an iterate did not fit their dtype.
        self.packed: list[PackedTensor] = []
        self.residual = self.weight  # [B, N, K], W - Q
        self.left: Tensor | None = None  # [B, N, r], U
        self.right: Tensor | None = None  # [B, K, r], E^T U
        self.errors: list[list[float]] = [[] for _ in weights]
        self.weighted_errors: list[list[float]] = [[] for _ in weights]
        self.best: list[tuple[PackedTensor, Tensor, Tensor] | None] = [None] * len(weights)

    def times_factor(self, matrices: Tensor) -> Tensor:
        """[B, N, K] -> E F."""
        return torch.stack([matrix @ factor for matrix, factor in zip(matrices, self.factors, strict=True)])

    def step(self) -> bool:
        """Run one alternation. Returns False when all matrices are frozen."""
        if self.options.order == "quantize_first":
            if not self._quantize():
                return False
            self.approximate()
            return True
        self._solve(self.times_factor(self.residual))
        if not self._quantize():
            return False
        remaining = self.residual - self.low_rank_term()
        self._keep_best(remaining, self.times_factor(remaining))
        return True

    def approximate(self) -> None:
        """Compute the low-rank term of the residual, and the errors that it leaves."""
        weighted = self.times_factor(self.residual)
        self._solve(weighted)
        weighted -= self.left @ (self.left.mT @ weighted)
        self._keep_best(self.residual - self.low_rank_term(), weighted)

    def low_rank_term(self) -> Tensor:
        """[B, N, K], U U^T E."""
        return self.left @ self.right.mT

    def residual_of(self, packed: Sequence[PackedTensor]) -> None:
        self.packed = list(packed)
        self.residual = self.weight - torch.stack([p.dequantize(torch.float64) for p in packed])

    def _quantize(self) -> bool:
        """Compute Q and the residual. Returns False when all matrices are frozen."""
        target = self.weight if self.left is None else self.weight - self.low_rank_term()
        packed = []
        for matrix, columns in zip(target.float(), self.left_out, strict=True):
            if columns is not None:
                matrix[:, columns] = 0
            packed.append(self._quantized(matrix))
        self.residual_of(packed)
        for i, own in enumerate(packed):
            if not all(torch.isfinite(t).all() for t in (own.scale, own.offset) if t is not None):
                self._freeze(i)
            if self.frozen[i]:
                self.residual[i] = 0  # Its solver then has nothing to do and meets no NaN.
        return not all(self.frozen)

    def _freeze(self, i: int) -> None:
        """Stop a matrix whose scales did not fit their dtype: it stays at its best iterate, and the others go on."""
        self.frozen[i] = True
        if self.best[i] is None:
            self.best[i] = (self.packed[i], None, None)

    def _quantized(self, matrix: Tensor) -> PackedTensor:
        o = self.options
        codes, scale, offset = self.quantize_op(
            matrix, self.codebook, o.group_size, o.format.scale_rule, o.scale_dtype, o.scale_search
        )
        return o.packed(codes, scale, offset, self.codebook, matrix.shape[1])

    def _solve(self, weighted: Tensor) -> None:
        """U and E^T U from E F [B, N, K]."""
        self.left = low_rank.dominant_left_space(
            weighted, self.options.rank, mode=self.options.mode, seed=self.options.seed
        )
        self.right = self.residual.mT @ self.left

    def _keep_best(self, remaining: Tensor, weighted: Tensor) -> None:
        """Keep the iterate with the least ||R F||, given R (remaining) and R F (weighted), both [B, N, K]."""
        for i, (plain, own) in enumerate(zip(_norms(remaining), _norms(weighted), strict=True)):
            if self.frozen[i]:
                continue
            error = _ratio(own, self.weighted_norms[i])
            if not self.weighted_errors[i] or error < min(self.weighted_errors[i]):
                self.best[i] = (self.packed[i], self.left[i], self.right[i])
            self.errors[i].append(_ratio(plain, self.norms[i]))
            self.weighted_errors[i].append(error)

    def results(self) -> list[AdapterInit]:
        return [self._result(i) for i in range(len(self.best))]

    def _result(self, i: int) -> AdapterInit:
        """The best iterate as float32 factors, split evenly and divided by sqrt(scaling), and the errors of these."""
        packed, left, right = self.best[i]
        scaling = self.options.scaling
        init = AdapterInit(packed, None, None, scaling, math.inf, self.errors[i])
        init.weighted_errors = self.weighted_errors[i]
        if left is None:
            return init
        if self.options.rank_energy is not None:
            rank = self._rank_for_energy(i)
            left, right = left[:, :rank], right[:, :rank]
        right, left = (f[0] / math.sqrt(scaling) for f in low_rank.balanced_factors(right[None], left[None]))
        init.lora_A, init.lora_B = right.mT.contiguous().float(), left.contiguous().float()
        remaining = self.weight[i] - packed.dequantize(torch.float64)
        remaining -= scaling * (init.lora_B.double() @ init.lora_A.double())
        init.error = _ratio(remaining.norm().item(), self.norms[i])
        init.weighted_error = _ratio((remaining @ self.factors[i]).norm().item(), self.weighted_norms[i])
        at = init.weighted_errors.index(min(init.weighted_errors))
        init.errors[at], init.weighted_errors[at] = init.error, init.weighted_error
        return init

    def _rank_for_energy(self, i: int) -> int:
        """The least r with sum_{j <= r} s_j >= energy * sum_j s_j over the singular values s of E F, at most rank."""
        singular = low_rank.singular_values(self.residual[i] @ self.factors[i])
        return low_rank.rank_for_energy(singular, self.options.rank_energy, self.options.rank)


def _norms(matrices: Tensor) -> list[float]:
    return torch.linalg.vector_norm(matrices, dim=(1, 2)).tolist()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
