"""LoftQ's alternation in plain torch: the reference of the compiled driver (csrc/loftq), and what serves without it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from loftq_kernels.formats import PackedTensor
from loftq_kernels.initializers import low_rank
from loftq_kernels.initializers.loftq_options import LoftQOptions
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.ops.reference import quantize_residual_


def run(weights: list[Tensor], options: LoftQOptions) -> list[AdapterInit]:
    """Same-shape weights [N, K] on one device through num_iter alternations.

    A scale that does not fit its dtype ends the alternation of the whole batch and shows as non-finite in the result.
    """
    results, sound = _alternate(weights, options)
    exact = replace(options, mode="exact")
    for i, weight in enumerate(weights):
        if not sound[i]:
            results[i] = _alternate([weight], exact)[0][0]
    return results


def _alternate(weights: list[Tensor], options: LoftQOptions) -> tuple[list[AdapterInit], list[bool]]:
    alternation = Alternation(weights, options)
    for _ in range(options.num_iter):
        if not alternation.step():
            break
    return alternation.results(), alternation.sound


class Alternation:
    """LoftQ's state for a batch of matrices; keeps one float32 residual a matrix.

    The low-rank term of a matrix E is held as V, an orthonormal basis on its shorter side, and E V. Then
    ||E - E V V^T||^2 = ||E||^2 - ||E V||^2, so an adapter never makes the error worse than none.
    """

    def __init__(self, weights: list[Tensor], options: LoftQOptions):
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
        )  # also holds the low-rank term
        self.packed: list[PackedTensor | None] = [None] * len(weights)
        self.basis: Tensor | None = None  # [B, short, >= r], the last right space
        self.image: Tensor | None = None  # [B, long, r], E V for the first r directions
        self.errors: list[list[float]] = [[] for _ in weights]
        self.sound = [True] * len(weights)  # see `_is_sound`
        self.best: list[tuple[PackedTensor, Tensor, Tensor] | None] = [None] * len(weights)

    def step(self) -> bool:
        """One alternation, see `loftq_init`; False when scales do not fit their dtype, so that nothing can follow."""
        if self.options.order == "quantize_first":
            if self.image is not None:
                self._write_low_rank()
            residual_norm2 = self._quantize()
            if not all(map(math.isfinite, residual_norm2)):
                return self._give_up()
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
            if not all(map(math.isfinite, self._quantize())):
                return self._give_up()
            remaining = (self.residual - low_rank_term).double().square().sum((1, 2)).tolist()
        self._keep_best(remaining)
        return True

    def _give_up(self) -> bool:
        for i, packed in enumerate(self.packed):
            self.best[i] = (packed, None, None)
            self.errors[i].append(math.inf)
        return False

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
        return norms

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

    def _write_low_rank(self) -> None:
        """residual <- the low-rank term E V V^T."""
        left, right = self.image, self.basis[..., : self.options.rank]
        if self.wide:
            left, right = right, left
        torch.matmul(left, right.mT, out=self.residual)

    def _keep_best(self, remaining: list[float]) -> None:
        for i, left in enumerate(remaining):
            error = math.sqrt(max(left, 0.0)) / self.norms[i] if self.norms[i] > 0 else 0.0
            if not self.errors[i] or error < min(self.errors[i]):
                self.best[i] = (self.packed[i], self.image[i].clone(), self.basis[i, :, : self.options.rank].clone())
            self.errors[i].append(error)

    def _is_sound(self, residual: Tensor, remaining: Tensor, long: Tensor, start: Tensor) -> bool:
        """As `is_sound` in csrc/loftq/loftq.cpp."""
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
        if self.best[0][1] is None:
            return [
                AdapterInit(packed, None, None, scaling, math.inf, errors)
                for (packed, _, _), errors in zip(self.best, self.errors, strict=True)
            ]
        images = torch.stack([image for _, image, _ in self.best])
        bases = torch.stack([basis for _, _, basis in self.best])
        long, short = low_rank.balanced_factors(images, bases)
        left, right = (short, long) if self.wide else (long, short)
        results = []
        first = low_rank.gaussian(max(self.weights[0].shape), 1, self.options.seed, images.device)
        for i, (packed, _, _) in enumerate(self.best):
            root = math.sqrt(self.unit[i] / scaling)
            lora_A, lora_B = (right[i].mT * root).contiguous(), (left[i] * root).contiguous()
            residual = (self.weights[i] - packed.dequantize(backend="reference")).div_(self.unit[i])
            remaining = residual - left[i] @ right[i].mT
            self.sound[i] = self._is_sound(residual, remaining, long[i], first)
            error = torch.linalg.vector_norm(remaining, dtype=torch.float64).item()
            error = error / self.norms[i] if self.norms[i] > 0 else 0.0
            # ||E||^2 - ||E V||^2 cannot resolve an error far below ||E||: no estimate is better than the one measured.
            errors = [max(estimate, error) for estimate in self.errors[i]]
            errors[self.errors[i].index(min(self.errors[i]))] = error
            results.append(AdapterInit(packed, lora_A, lora_B, scaling, error, errors))
        return results


def _power_of_two_below(weight: Tensor) -> float:
    largest = weight.abs().max().item()
    return 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
