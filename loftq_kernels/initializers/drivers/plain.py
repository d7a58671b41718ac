"""LoftQ's alternation in plain torch: the reference of the compiled driver (csrc/loftq), and its substitute."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from loftq_kernels.formats import PackedTensor
from loftq_kernels.initializers import parallel
from loftq_kernels.initializers.drivers import low_rank
from loftq_kernels.initializers.options import SolverOptions
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.ops.reference import quantize_residual_


def run(weights: list[Tensor], options: SolverOptions) -> list[AdapterInit]:
    """Same-shape weights [N, K] on one device through num_iter alternations.

    A matrix with a scale that does not fit its dtype stays at its best iterate; if there is none, that scale is
    non-finite in the result.
    """
    results, sound = _alternate(weights, options)
    exact = replace(options, mode="exact")
    for i, weight in enumerate(weights):
        if not sound[i]:
            results[i] = _alternate([weight], exact)[0][0]
    return results


def _alternate(weights: list[Tensor], options: SolverOptions) -> tuple[list[AdapterInit], list[bool]]:
    alternation = Alternation(weights, options)
    for _ in range(options.num_iter):
        parallel.poll()
        if not alternation.step():
            break
    return alternation.results(), alternation.sound


STEEP = 0.05  # A matrix with less than this share of its norm left counts as steep.
MOST_FLAW = 1e-3  # The largest deviation from orthonormality that is accepted.


class Alternation:
    """LoftQ's state for a batch of matrices; keeps one float32 residual per matrix.

    The low-rank term of a matrix E is held as V, an orthonormal basis on its shorter side, and E V. Then
    ||E - E V V^T||^2 = ||E||^2 - ||E V||^2, so an adapter never makes the error worse than none.
    """

    def __init__(self, weights: list[Tensor], options: SolverOptions):
        self.weights, self.options = weights, options
        shape = len(weights), *weights[0].shape
        self.wide = shape[2] > shape[1]
        self.codebook = options.format.codebook(weights[0].device)
        # Residuals are divided by a power of two, which is exact, so that 1e30 or 1e-30 weights have float32 squares.
        self.unit = [_power_of_two_below(weight) for weight in weights]
        self.norms = [
            torch.linalg.vector_norm(weight, dtype=torch.float64).item() / unit
            for weight, unit in zip(weights, self.unit, strict=True)
        ]
        self.residual = torch.zeros(
            shape, dtype=torch.float32, device=weights[0].device
        )  # It also holds the low-rank term.
        self.packed: list[PackedTensor | None] = [None] * len(weights)
        self.basis: Tensor | None = None  # [B, short, >= r], the last right space
        self.image: Tensor | None = None  # [B, long, r], E V for the first r directions
        self.errors: list[list[float]] = [[] for _ in weights]
        self.sound = [True] * len(weights)  # see `_is_sound`
        self.frozen = [False] * len(weights)  # True once scales of an iterate did not fit their dtype.
        self.best: list[tuple[PackedTensor, Tensor, Tensor] | None] = [None] * len(weights)

    def step(self) -> bool:
        """Run one alternation (see `loftq_init`). Returns False when all matrices are frozen."""
        if self.options.order == "quantize_first":
            if self.image is not None:
                self._write_low_rank()
            residual_norm2 = self._quantize()
            if all(self.frozen):
                return False
            self._solve()
            remaining = [whole - part for whole, part in zip(residual_norm2, self._captured_energy(), strict=True)]
        else:
            first = self.image is None
            if first:
                for weight, unit, residual in zip(self.weights, self.unit, self.residual, strict=True):
                    residual.copy_(weight).div_(unit)
            self._solve()
            if first and self.options.mode == "fast":
                self._note_steep_weights()
            self._write_low_rank()
            low_rank_term = self.residual.clone()
            self._quantize()
            if all(self.frozen):
                return False
            remaining = (self.residual - low_rank_term).double().square().sum((1, 2)).tolist()
        self._keep_best(remaining)
        return True

    def _captured_energy(self) -> list[float]:
        return self.image.double().square().sum((1, 2)).tolist()

    def _note_steep_weights(self) -> None:
        """Mark weights of which the low-rank part leaves hardly anything: that part needs an exact solver's digits."""
        for i, captured in enumerate(self._captured_energy()):
            if captured >= (1 - STEEP**2) * self.norms[i] ** 2 > 0:
                self.sound[i] = False

    def _quantize(self) -> list[float]:
        """residual <- W - quantize(W - low-rank term) in units of `unit`; returns its squared norms."""
        norms = []
        for i, (weight, unit, residual) in enumerate(zip(self.weights, self.unit, self.residual, strict=True)):
            codes, scale, offset, norm2 = quantize_residual_(
                weight,
                residual.mul_(unit),
                self.codebook,
                self.options.group_size,
                self.options.format.scale_rule,
                self.options.scale_dtype,
                self.options.scale_search,
            )
            residual.div_(unit)
            norms.append(norm2.item() / unit**2)
            self.packed[i] = self.options.packed(codes, scale, offset, self.codebook, weight.shape[1])
            if not math.isfinite(norms[-1]):
                self._freeze(i)
        return norms

    def _freeze(self, i: int) -> None:
        """Stop a matrix whose scales did not fit their dtype: it stays at its best iterate, and the others go on."""
        if self.best[i] is None:
            self.best[i] = (self.packed[i], None, None)
            self.errors[i].append(math.inf)
        self.frozen[i] = True
        self.residual[i].zero_()

    def _solve(self) -> None:
        """Basis and image from the residual."""
        matrix = self.residual.mT if self.wide else self.residual
        self.basis, image = low_rank.dominant_space(
            matrix,
            self.options.rank,
            mode=self.options.mode,
            start=self.basis,
            seed=self.options.seed,
            warm_steps=self.options.warm_steps,
        )
        self.image = image[..., : self.options.rank]
        if self.options.mode == "exact":
            return
        gram = self.basis.mT @ self.basis
        flaws = (gram * (gram - torch.eye(gram.shape[-1], device=gram.device))).abs().amax((1, 2)).tolist()
        for i, flaw in enumerate(flaws):  # Zero columns are allowed; rounding leaves about 1e-6.
            self.sound[i] = self.sound[i] and flaw < MOST_FLAW

    def _write_low_rank(self) -> None:
        """residual <- the low-rank term E V V^T."""
        left, right = self.image, self.basis[..., : self.options.rank]
        if self.wide:
            left, right = right, left
        torch.matmul(left, right.mT, out=self.residual)

    def _keep_best(self, remaining: list[float]) -> None:
        for i, left in enumerate(remaining):
            if self.frozen[i]:
                continue
            error = math.sqrt(max(left, 0.0)) / self.norms[i] if self.norms[i] > 0 else 0.0
            if not self.errors[i] or error < min(self.errors[i]):
                self.best[i] = (self.packed[i], self.image[i].clone(), self.basis[i, :, : self.options.rank].clone())
            self.errors[i].append(error)

    def _is_sound(self, residual: Tensor, remaining: Tensor, long: Tensor, start: Tensor) -> bool:
        """Whether R = E - E V V^T lacks what V should hold: its norm may not exceed that of E, nor its largest singular
        value, ||R R^T g|| / ||R^T g|| or more, the smallest one that V holds."""
        if self.options.mode == "exact" or self.options.order == "svd_first":
            return True
        whole, rest = (torch.linalg.vector_norm(m, dtype=torch.float64).item() for m in (residual, remaining))
        tall = remaining.mT if self.wide else remaining
        once = tall.mT @ start
        largest = ((tall @ once).double().norm() / once.double().norm().clamp(min=1e-150)).item()
        kept = long[:, -1].double().square().sum().item()
        return rest <= whole * (1 + 1e-4) and largest <= 1.5 * kept + 1e-6 * whole

    def results(self) -> list[AdapterInit]:
        """The best iterates, their factors split evenly and divided by sqrt(scaling)."""
        scaling = self.options.scaling
        results: list[AdapterInit | None] = [
            AdapterInit(packed, None, None, scaling, math.inf, errors) if image is None else None
            for (packed, image, _), errors in zip(self.best, self.errors, strict=True)
        ]
        done = [i for i, result in enumerate(results) if result is None]
        if not done:
            return results
        images, bases = (torch.stack([self.best[i][part] for i in done]) for part in (1, 2))
        long, short = low_rank.balanced_factors(images, bases)
        left, right = (short, long) if self.wide else (long, short)
        start = low_rank.gaussian(max(self.weights[0].shape), 1, self.options.seed, images.device)
        for j, i in enumerate(done):
            results[i] = self._finish(i, left[j], right[j], long[j], start)
        return results

    def _finish(self, i: int, left: Tensor, right: Tensor, long: Tensor, start: Tensor) -> AdapterInit:
        """The factors of matrix i, and its error from the stored weight itself."""
        packed, scaling = self.best[i][0], self.options.scaling
        root = math.sqrt(self.unit[i] / scaling)
        residual = (self.weights[i] - packed.dequantize(backend="reference")).div_(self.unit[i])
        remaining = residual - left @ right.mT
        self.sound[i] = self.sound[i] and self._is_sound(residual, remaining, long, start)
        error = torch.linalg.vector_norm(remaining, dtype=torch.float64).item()
        error = error / self.norms[i] if self.norms[i] > 0 else 0.0
        # ||E||^2 - ||E V||^2 cannot resolve an error far below ||E||: no estimate is better than the one measured.
        errors = [max(estimate, error) for estimate in self.errors[i]]
        errors[self.errors[i].index(min(self.errors[i]))] = error
        return AdapterInit(packed, (right.mT * root).contiguous(), (left * root).contiguous(), scaling, error, errors)


def _power_of_two_below(weight: Tensor) -> float:
    largest = weight.abs().max().item()
    return 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
