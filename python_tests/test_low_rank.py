"""The truncated SVD solvers: energy captured, never vectors."""

from __future__ import annotations

import pytest
import torch
from helpers import gaussian

from loftq_kernels.initializers.drivers import low_rank


def captured(image: torch.Tensor) -> torch.Tensor:
    return image.double().square().sum((-2, -1))


def optimal(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double())[..., :rank].square().sum(-1)


def product(image: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    return image.double() @ basis.double().mT


SHAPES = [(1, 1), (5, 1), (7, 7), (100, 31), (200, 96)]


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_basis_and_image(shape, mode):
    matrix = gaussian(2, *shape)
    for rank in sorted({1, shape[1] // 2 or 1, shape[1]}):
        basis, image = low_rank.dominant_space(matrix, rank, mode=mode, start=None, seed=0)
        assert basis.shape[-1] >= rank and basis.shape[-1] <= shape[1]
        identity = torch.eye(basis.shape[-1]).expand(2, -1, -1)
        torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=1e-5)
        torch.testing.assert_close(image, matrix @ basis, rtol=1e-4, atol=1e-4)
        columns = image.double().square().sum(-2)
        assert (columns.diff(dim=-1) <= 1e-4 * columns[..., :1]).all(), "best direction first"
        share = captured(image[..., :rank]) / optimal(matrix, rank)
        # Where the Krylov basis does not fit into the space "fast" takes fewer steps, and "auto" would not choose it.
        fits = low_rank.resolve_mode("auto", rank, shape[1]) == "fast" or shape[1] <= low_rank.block_width(rank)
        least = 1 - 1e-5 if mode == "exact" else 0.98 if fits else 0.85
        assert (share <= 1 + 1e-5).all() and (share >= least).all()


@pytest.mark.parametrize("shape", [(50, 31), (64, 64)], ids=str)
def test_exact_is_the_truncated_svd(shape):
    matrix = gaussian(1, *shape)
    basis, image = low_rank.dominant_space(matrix, 5, mode="exact", start=None, seed=0)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(
        product(image, basis), (u[..., :5] * s[..., None, :5]) @ vh[..., :5, :], rtol=0, atol=1e-5
    )


def test_exact_survives_a_steep_spectrum():
    """A float32 Gram matrix would lose what lies below 3e-4 of the largest singular value."""
    u, v = (torch.linalg.qr(gaussian(60, 40, seed=seed, dtype=torch.float64)).Q for seed in (0, 1))
    spectrum = torch.logspace(0, -6, 40, dtype=torch.float64)
    matrix = (u * spectrum @ v[:40].T).float()[None]
    basis, image = low_rank.dominant_space(matrix, 20, mode="exact", start=None, seed=0)
    left = (matrix[0].double() - product(image, basis)[0]).norm()
    assert left <= 1.01 * spectrum[20:].norm() + 1e-6


def test_fast_captures_a_flat_spectrum():
    """Noise has the flattest spectrum there is: 99% of the optimal energy from a cold start, more when warm."""
    matrix = gaussian(1, 512, 384)
    basis, cold = low_rank.dominant_space(matrix, 16, mode="fast", start=None, seed=0)
    _, warm = low_rank.dominant_space(matrix, 16, mode="fast", start=basis, seed=0)
    best = optimal(matrix, 16)
    assert captured(cold[..., :16]) >= 0.98 * best
    assert captured(cold[..., :16]) <= captured(warm[..., :16]) * (1 + 1e-6) <= best * (1 + 1e-5)


def test_fast_is_exact_where_the_rank_is_low():
    matrix = gaussian(1, 200, 3) @ gaussian(1, 3, 150, seed=1)
    basis, image = low_rank.dominant_space(matrix, 3, mode="fast", start=None, seed=0)
    torch.testing.assert_close(product(image[..., :3], basis[..., :3]).float(), matrix, rtol=0, atol=1e-3)


def test_seed_and_batch():
    """A seed fixes the result, and a matrix gets the same one alone and in a batch."""
    matrix = gaussian(3, 100, 80)
    for seed in (0, 7):
        _, together = low_rank.dominant_space(matrix, 4, mode="fast", start=None, seed=seed)
        for i in range(3):
            _, alone = low_rank.dominant_space(matrix[i : i + 1], 4, mode="fast", start=None, seed=seed)
            torch.testing.assert_close(captured(together[i]), captured(alone[0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_zero_and_rank_deficient(mode):
    matrix = torch.zeros(3, 60, 50)
    matrix[1] = torch.outer(gaussian(60), gaussian(50))
    matrix[2, 3, 4] = 1e-20
    basis, image = low_rank.dominant_space(matrix, 4, mode=mode, start=None, seed=0)
    assert basis.isfinite().all() and image.isfinite().all()
    left, right = low_rank.balanced_factors(image[..., :4], basis[..., :4])
    assert left.isfinite().all() and right.isfinite().all()
    torch.testing.assert_close(left @ right.mT, matrix, rtol=0, atol=1e-5)


def test_balanced_factors():
    """U sqrt(S) and V sqrt(S): the same product, equal Gram matrices, both diagonal."""
    matrix = gaussian(2, 90, 40)
    basis, image = low_rank.dominant_space(matrix, 6, mode="exact", start=None, seed=0)
    left, right = low_rank.balanced_factors(image, basis)
    torch.testing.assert_close(left @ right.mT, image @ basis.mT, rtol=1e-4, atol=1e-4)
    singular = torch.diag_embed(torch.linalg.svdvals(matrix)[:, :6])
    for factor in (left, right):
        torch.testing.assert_close(factor.mT @ factor, singular, rtol=1e-4, atol=1e-3)


def test_mode():
    assert low_rank.resolve_mode("exact", 1, 4096) == "exact"
    assert low_rank.resolve_mode("fast", 8, 8) == "fast"
    assert low_rank.resolve_mode("auto", 16, 4096) == "fast"
    assert low_rank.resolve_mode("auto", 64, 128) == "exact"
