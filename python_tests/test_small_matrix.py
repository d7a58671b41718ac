"""The ops on batches of small matrices: decompositions by their properties, in any size; see small_matrix.h."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICES, gaussian
from properties import given, st

from loftq_kernels.ops import budget  # with the package come the ops

OPS = torch.ops.loftq_kernels
DTYPES = [torch.float32, torch.float64]
sizes = st.integers(1, 480)
batches = st.integers(1, 4)
seeds = st.integers(0, 1000)


tolerance = budget.of_decomposition  # what the C++ tests of the kernels ask as well


def with_values(values: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    """[B, rows, n] float64 with the singular values [B, n]; symmetric for rows = 0."""
    batch, columns = values.shape
    v = torch.linalg.qr(gaussian(batch, columns, columns, seed=seed, dtype=torch.float64)).Q
    u = v if rows == 0 else torch.linalg.qr(gaussian(batch, rows, columns, seed=seed + 1, dtype=torch.float64)).Q
    return (u * values.unsqueeze(-2)) @ v.mT


def spectrum(kind: str, batch: int, size: int) -> torch.Tensor:
    """[B, n] float64, descending."""
    i = torch.arange(size, dtype=torch.float64)
    values = {
        "flat": 1 - 1e-3 * i / size,  # the gaps of 1.001 of quantization residuals
        "steep": 10.0 ** (-6 * i / size),
        "clustered": 1 - 0.5 * (i > size // 2),
        "deficient": (i <= size // 2).double(),
        "zero": 0 * i,
    }[kind]
    return values.expand(batch, -1)


def assert_orthonormal(v: torch.Tensor, dtype: torch.dtype) -> None:
    identity = torch.eye(v.shape[-1], dtype=torch.float64).expand(len(v), -1, -1)
    torch.testing.assert_close(v.mT @ v, identity, rtol=0, atol=tolerance(v.shape[-1], dtype))


def check_eigh(a: torch.Tensor, device: str, dtype: torch.dtype) -> None:
    """a [B, n, n] float64: orthogonality, reconstruction, and values of the float64 reference, all of the rounded a."""
    a = a.to(dtype)
    values, vectors, info = (out.cpu() for out in OPS.jacobi_eigh(a.to(device)))
    a, values, vectors = a.double(), values.double(), vectors.double()
    assert (info == 0).all() and (values.diff(dim=-1) <= 0).all()
    assert_orthonormal(vectors, dtype)
    exact = torch.linalg.eigvalsh(a).flip(-1)
    error = tolerance(a.shape[-1], dtype) * exact[:, :1]
    assert ((values - exact).abs() <= error).all()
    assert ((a @ vectors - vectors * values.unsqueeze(-2)).abs() <= error.unsqueeze(-1)).all()


def check_svd(a: torch.Tensor, device: str, dtype: torch.dtype) -> None:
    a = a.to(dtype)
    u, values, v, info = (out.cpu() for out in OPS.jacobi_svd(a.to(device)))
    a, u, values, v = a.double(), u.double(), values.double(), v.double()
    assert (info == 0).all() and (values.diff(dim=-1) <= 0).all() and (values >= 0).all()
    assert_orthonormal(v, dtype)
    exact = torch.linalg.svdvals(a)
    error = tolerance(a.shape[-1], dtype) * exact[:, :1]
    assert ((values - exact).abs() <= error).all()
    assert ((a - (u * values.unsqueeze(-2)) @ v.mT).abs() <= error.unsqueeze(-1)).all()
    norms = u.square().sum(-2)
    torch.testing.assert_close(norms, (values > 0).double(), rtol=0, atol=4 * tolerance(a.shape[-1], dtype))


def check_cholesky(block: torch.Tensor, device: str, dtype: torch.dtype) -> None:
    """Y R^-1 is orthonormal where the Gram matrix of block Y [B, m, b] is well conditioned."""
    gram = (block.mT @ block).to(dtype)
    r_inverse, info = (out.cpu() for out in OPS.cholesky_inverse_factor(gram.to(device)))
    assert r_inverse.dtype == torch.float32 and (info == 0).all()
    assert torch.equal(r_inverse, r_inverse.triu())
    assert_orthonormal(block @ r_inverse.double(), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestProperties:
    @given(sizes, batches, seeds, st.sampled_from(["flat", "steep", "clustered", "deficient", "zero"]))
    def test_eigh(self, device, dtype, size, batch, seed, kind):
        check_eigh(with_values(spectrum(kind, batch, size), 0, seed), device, dtype)

    @given(st.integers(1, 160), batches, seeds, st.integers(0, 200), st.sampled_from(["flat", "steep", "zero"]))
    def test_svd(self, device, dtype, size, batch, seed, more_rows, kind):
        check_svd(with_values(spectrum(kind, batch, size), size + more_rows, seed), device, dtype)

    @given(st.integers(1, 150), batches, seeds)
    def test_cholesky(self, device, dtype, size, batch, seed):
        check_cholesky(gaussian(batch, 4 * size + 100, size, seed=seed, dtype=torch.float64), device, dtype)


@pytest.mark.parametrize("device", DEVICES)
class TestInfo:
    """What goes wrong inside a matrix shows in its info entry and leaves the others alone."""

    def test_not_finite(self, device):
        good = spectrum("steep", 3, 20)
        a = with_values(good, 0, 0).float()
        a[1, 3, 2] = torch.nan
        for name in ("jacobi_eigh", "jacobi_svd", "cholesky_inverse_factor"):
            *results, info = (out.cpu() for out in getattr(OPS, name)(a.to(device)))
            assert info[1] == -1 and (info[[0, 2]] >= 0).all()
            for result in results:
                assert result[1].isnan().all()
                assert result[[0, 2]].isfinite().all()

    def test_cholesky_shifts(self, device):
        """A deficient Gram matrix is shifted, one round lowers its condition number, and a zero column stays zero."""
        block = gaussian(2, 100, 10, dtype=torch.float64)
        block[0, :, 7] = block[0, :, 2]
        block[1, :, 4] = 0
        r_inverse, info = (out.cpu() for out in OPS.cholesky_inverse_factor((block.mT @ block).float().to(device)))
        assert (info > 0).all() and r_inverse.isfinite().all()
        q = block @ r_inverse.double()
        assert torch.linalg.matrix_norm(q, 2).max() < 1.01
        assert (q[1, :, 4] == 0).all()

    def test_cholesky_indefinite(self, device):
        gram = torch.tensor([[[1.0, 3.0], [3.0, 1.0]], [[1.0, 0.5], [0.5, 1.0]]])
        r_inverse, info = (out.cpu() for out in OPS.cholesky_inverse_factor(gram.to(device)))
        assert info[0] != 0 and info[1] == 0
        expected = torch.linalg.inv(torch.linalg.cholesky(gram[1].double(), upper=True)).float()
        torch.testing.assert_close(r_inverse[1], expected)


@pytest.mark.parametrize("name", ["jacobi_eigh", "jacobi_svd", "cholesky_inverse_factor"])
class TestArguments:
    def test_shapes(self, name):
        for shape in [(4, 4), (2, 3, 4), (1, 2, 3, 3)]:
            with pytest.raises(ValueError, match="has shape"):
                getattr(OPS, name)(torch.zeros(shape))
        with pytest.raises(TypeError, match=r"torch\.float16"):
            getattr(OPS, name)(torch.zeros(1, 2, 2, dtype=torch.float16))

    @pytest.mark.parametrize("device", DEVICES)
    def test_empty(self, name, device):
        for shape in [(0, 3, 3), (2, 0, 0)]:
            outputs = getattr(OPS, name)(torch.zeros(shape, device=device))
            assert [out.numel() for out in outputs[:-1]] == [0] * (len(outputs) - 1)
            assert outputs[-1].tolist() == [0] * shape[0]

    @pytest.mark.gpu
    def test_cuda_tensors_have_a_kernel(self, name):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"loftq_kernels::{name}", "CUDA")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 80, 160, 400, 480])
def test_large_batches(size, dtype):
    """More matrices than multiprocessors: blocks go on to a next one. 400 and 160 are the initializer's at rank 64."""
    check_eigh(with_values(spectrum("flat", 150, size), 0, 0), "cuda", dtype)
