"""EoRA and the weighted LoftQ: the forms of the papers in float64, optimality, and what weighting is worth."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    BACKENDS,
    DEVICES,
    FORMATS,
    dense_of,
    gaussian,
    minilm_weights,
    output_error,
    same_packed,
    with_outliers,
)
from torch import Tensor

import loftq_kernels as lk
from loftq_kernels.initializers import engine
from loftq_kernels.initializers.drivers import gram as gram_driver
from loftq_kernels.initializers.drivers import weighted

SHAPES = [(96, 128), (128, 96), (64, 64), (5, 31), (31, 5)]


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A residual and a Gram matrix of correlated inputs with outlier channels, float64."""
    weight, x = with_outliers(seed, rows, max(columns, 8))
    x = x[:, :columns]
    return weight.double()[:, :columns], x.T @ x / len(x)


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def cholesky_form(residual: Tensor, gram: Tensor, rank: int) -> Tensor:
    """ASER: the SVD of E C with S = C C^T, times C^-1."""
    factor = torch.linalg.cholesky(gram)
    u, s, vh = truncated(residual @ factor, rank)
    return (u * s) @ torch.linalg.solve_triangular(factor, vh, upper=False, left=False)


def eigen_form(residual: Tensor, gram: Tensor, rank: int) -> Tensor:
    """EoRA: the SVD of E G L^(1/2) with S = G L G^T, times L^(-1/2) G^T."""
    values, vectors = torch.linalg.eigh(gram)
    u, s, vh = truncated(residual @ vectors * values.sqrt(), rank)
    return (u * s) @ (vh / values.sqrt()) @ vectors.T


def inverse_free_form(residual: Tensor, gram: Tensor, rank: int) -> Tensor:
    """U U^T E, U the leading eigenvectors of E S E^T."""
    u = torch.linalg.eigh(residual @ gram @ residual.T).eigenvectors[:, -rank:]
    return u @ u.T @ residual


def weighted_norm(matrix: Tensor, gram: Tensor) -> float:
    return math.sqrt(max((matrix @ gram @ matrix.T).trace().item(), 0))


class TestForms:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_agree(self, shape):
        residual, gram = problem(*shape)
        for rank in sorted({1, min(shape) // 2, min(shape)}):
            left, right = lk.weighted_low_rank(residual, gram, rank)
            assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1]) and left.dtype == torch.float64
            for form in (cholesky_form, eigen_form, inverse_free_form):
                other = form(residual, gram, rank)
                assert (left @ right - other).norm() <= 1e-8 * other.norm(), form.__name__

    @pytest.mark.parametrize("device", DEVICES)
    def test_error_is_the_tail_of_the_spectrum(self, device):
        """Eckart and Young: no other product of that rank has a smaller weighted error."""
        residual, gram = problem(96, 128)
        singular = torch.linalg.svdvals(residual @ torch.linalg.cholesky(gram))
        left, right = (f.cpu() for f in lk.weighted_low_rank(residual.to(device), gram.to(device), 8))
        assert weighted_norm(residual - left @ right, gram) == pytest.approx(singular[8:].norm().item(), rel=1e-9)

    def test_factors_are_split_evenly(self):
        left, right = lk.weighted_low_rank(*problem(96, 128), 8)
        assert (left.T @ left - right @ right.T).abs().max() <= 1e-9 * left.square().sum()
        gram = left.T @ left
        assert (gram - gram.diag().diag()).abs().max() <= 1e-9 * gram.max()

    def test_scale_of_the_gram_matrix_does_not_matter(self):
        residual, gram = problem(96, 128)
        first, second = (lk.weighted_low_rank(residual, c * gram, 8) for c in (1, 1e-12))
        torch.testing.assert_close(first[0] @ first[1], second[0] @ second[1], rtol=1e-8, atol=1e-10)

    def test_identity_is_the_plain_svd(self):
        residual, _ = problem(96, 128)
        left, right = lk.weighted_low_rank(residual, torch.eye(128), 8)
        u, s, vh = truncated(residual, 8)
        torch.testing.assert_close(left @ right, (u * s) @ vh, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dtype(self, dtype):
        residual, gram = problem(96, 128)
        left, right = lk.weighted_low_rank(residual.to(dtype), gram.float(), 8)
        assert left.dtype == right.dtype == torch.float32
        rounded = residual.to(dtype).double()
        best = weighted_norm(rounded - inverse_free_form(rounded, gram, 8), gram)
        assert weighted_norm(rounded - left.double() @ right.double(), gram) == pytest.approx(best, rel=1e-5)

    def test_fast_is_close(self):
        """Whitened spectra are steep: block Krylov finds nearly all of them."""
        residual, gram = problem(300, 400)
        exact, fast = (
            weighted_norm(residual - torch.mm(*lk.weighted_low_rank(residual, gram, 8, svd=svd)), gram)
            for svd in ("exact", "fast")
        )
        assert exact * (1 - 1e-9) <= fast <= 1.001 * exact


class TestSingular:
    """Fewer tokens than channels, dead channels, no activity at all: no inverse, so nothing to damp."""

    @pytest.mark.parametrize("tokens", [1, 20])
    def test_few_tokens(self, tokens):
        weight, x = with_outliers()
        x = x[:tokens]
        own = lk.InputStatistics.from_inputs(x)
        init = lk.eora_init(weight, own, "nf2", 16)
        plain = lk.loftq_init(weight, "nf2", 16, 1)
        assert torch.isfinite(init.lora_A).all() and torch.isfinite(init.lora_B).all()
        error = output_error(weight, dense_of(init), x)
        assert init.weighted_error == pytest.approx(error, rel=1e-6, abs=1e-7)
        assert error < (1e-6 if tokens == 1 else 0.5 * output_error(weight, dense_of(plain), x))

    def test_minimises_the_weighted_error_all_the_same(self):
        """Where S has rank 20 and r is 8: the tail of the singular values of E X^T."""
        residual, _ = problem(96, 128)
        x = gaussian(20, 128, dtype=torch.float64)
        singular = torch.linalg.svdvals(residual @ x.T)
        left, right = lk.weighted_low_rank(residual, x.T @ x, 8)
        error = ((residual - left @ right) @ x.T).norm().item()
        assert error == pytest.approx(singular[8:].norm().item(), rel=1e-6)

    def test_dead_channels(self):
        weight, x = with_outliers()
        x[:, ::3] = 0
        init = lk.eora_init(weight, lk.InputStatistics.from_inputs(x), "nf2", 16)
        assert init.weighted_error == pytest.approx(output_error(weight, dense_of(init), x), rel=1e-6)

    @pytest.mark.parametrize("what", ["inputs", "weight"])
    def test_nothing_but_zeros(self, what):
        weight, x = with_outliers()
        (x if what == "inputs" else weight).zero_()
        for init in (lk.eora_init, lk.aser_init, lambda w, s: lk.loftq_init(w, statistics=s)):
            done = init(weight, lk.InputStatistics.from_inputs(x))
            assert done.weighted_error == 0 and torch.isfinite(dense_of(done)).all()

    def test_a_gram_matrix_rounded_to_float32(self):
        """Rounding makes the smallest eigenvalues negative; that is not an error."""
        x = gaussian(40, 128, dtype=torch.float64)
        gram = (x.T @ x / 40).float()
        assert torch.linalg.eigvalsh(gram.double())[0] < 0
        factor = gram_driver.gram_factor(gram)
        assert (factor @ factor.T - gram.double()).norm() <= 1e-6 * gram.norm()

    def test_no_gram_matrix(self):
        with pytest.raises(ValueError, match="no Gram matrix: its eigenvalues are -1 .. 1"):
            lk.weighted_low_rank(gaussian(8, 8), torch.diag(torch.tensor([1.0] * 7 + [-1.0])), 2)


class TestEoRA:
    @pytest.mark.parametrize("format", ["nf4", "nf2", "int2", "int4"])
    @pytest.mark.parametrize("seed", range(3))
    def test_weighted_beats_diagonal_beats_plain(self, format, seed):
        """On the activations, and on others of the same distribution."""
        weight, x = with_outliers(seed, tokens=4000)
        x, held_out = x[:3000], x[3000:]
        own = lk.InputStatistics.from_inputs(x)
        packed = lk.quantize(weight, format)
        residual = weight.double() - packed.dequantize(torch.float64)
        diagonal = torch.mm(*lk.weighted_low_rank(residual, own.gram.diag().diag(), 16))
        eora = lk.eora_init(weight, own, format, 16)
        plain = lk.loftq_init(weight, format, 16, 1, svd="exact")
        assert same_packed(eora.packed, packed) and same_packed(plain.packed, packed)
        for data in (x, held_out):
            errors = [
                output_error(weight, approximation, data)
                for approximation in (dense_of(eora), packed.dequantize() + diagonal, dense_of(plain))
            ]
            assert errors[0] < 0.95 * errors[1] < 0.9 * errors[2], errors
        assert eora.weighted_error == pytest.approx(output_error(weight, dense_of(eora), x), rel=1e-9)
        assert eora.error > plain.error, "what is gained on the activations is paid for in the weight"

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("shape", [(96, 128), (77, 130), (130, 31)], ids=str)
    def test_is_the_form_of_the_paper(self, format, shape):
        weight, x = with_outliers(1, *shape)
        own = lk.InputStatistics.from_inputs(x)
        init = lk.eora_init(weight, own, format, 8, group_size=32)
        residual = weight.double() - init.packed.dequantize(torch.float64)
        product = init.lora_B.double() @ init.lora_A.double()
        expected = eigen_form(residual, own.gram, 8)
        assert (product - expected).norm() <= 1e-6 * expected.norm()  # the factors are float32
        error = (residual - product).norm() / weight.double().norm()
        assert init.error == pytest.approx(error.item(), rel=1e-9)
        assert init.errors == [init.error] and init.weighted_errors == [init.weighted_error]

    def test_on_a_weight_quantized_elsewhere(self):
        """Scales that no rule here would choose; the packed weight is kept as it is."""
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        packed = lk.quantize(1.1 * weight, "int2", 32, scale_search=True, scale_dtype=torch.float32)
        bits = packed.clone()
        init = lk.eora_init(weight, own, rank=16, packed=packed)
        assert same_packed(init.packed, bits)
        expected = inverse_free_form(weight.double() - packed.dequantize(torch.float64), own.gram, 16)
        assert (init.lora_B.double() @ init.lora_A.double() - expected).norm() <= 1e-6 * expected.norm()
        assert init.weighted_error < 0.5 * output_error(weight, packed.dequantize(), x)

    def test_same_as_its_own_quantization(self):
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        first = lk.eora_init(weight, own, "nf2", 8)
        second = lk.eora_init(weight, own, rank=8, packed=lk.quantize(weight, "nf2"))
        assert torch.equal(first.lora_A, second.lora_A) and torch.equal(first.lora_B, second.lora_B)

    @pytest.mark.parametrize("scaling", [0.25, 8.0])
    def test_scaling_is_divided_out(self, scaling):
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        one, other = (lk.eora_init(weight, own, "nf2", 8, scaling=s) for s in (1.0, scaling))
        torch.testing.assert_close(dense_of(one), dense_of(other), rtol=0, atol=1e-6)
        assert other.scaling == scaling and other.weighted_error == pytest.approx(one.weighted_error, rel=1e-5)

    @pytest.mark.parametrize(
        ("backend", "device"),
        [(backend, "cpu") for backend in BACKENDS] + [pytest.param(None, "cuda", marks=pytest.mark.gpu)],
    )
    def test_backends_and_devices(self, backend, device):
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        here = lk.eora_init(weight, own, "nf2", 8)
        there = lk.eora_init(weight, own, "nf2", 8, backend=backend, device=device)
        assert same_packed(here.packed, there.packed) and there.lora_A.device.type == "cpu"
        torch.testing.assert_close(dense_of(here), dense_of(there), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_dtypes_of_weights(self, dtype):
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        init = lk.eora_init(weight.to(dtype), own, "nf2", 8)
        same = lk.eora_init(weight.to(dtype).float(), own, "nf2", 8)
        assert init.lora_A.dtype == torch.float32 and torch.equal(init.lora_A, same.lora_A)

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    def test_modes(self, mode):
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        with mode(), torch.autocast("cpu", torch.bfloat16):
            init = lk.eora_init(weight.requires_grad_(), own, "nf2", 8)
        assert torch.equal(init.lora_A, lk.eora_init(weight, own, "nf2", 8).lora_A)
        assert not init.lora_A.is_inference() and not init.lora_A.requires_grad

    @pytest.mark.parametrize("magnitude", [1e30, 1e-25])
    def test_magnitudes(self, magnitude):
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        one = lk.eora_init(weight, own, "nf2", 8, scale_dtype=torch.float32)
        other = lk.eora_init(weight * magnitude, own, "nf2", 8, scale_dtype=torch.float32)
        assert other.weighted_error == pytest.approx(one.weighted_error, rel=1e-3)


class TestWeightedLoftQ:
    @pytest.mark.parametrize("format", ["nf4", "nf2", "int2"])
    def test_better_than_eora_and_never_worse_with_more_alternations(self, format):
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        inits = [lk.loftq_init(weight, format, 16, count, statistics=own) for count in (1, 2, 5)]
        assert torch.equal(inits[0].lora_A, lk.eora_init(weight, own, format, 16).lora_A)
        errors = [init.weighted_error for init in inits]
        assert errors[1] < errors[0] and errors[2] <= errors[1]
        assert len(inits[2].errors) == len(inits[2].weighted_errors) == 5
        assert errors[2] == min(inits[2].weighted_errors)
        assert errors[2] == pytest.approx(output_error(weight, dense_of(inits[2]), x), rel=1e-9)
        at = inits[2].weighted_errors.index(errors[2])
        assert inits[2].errors[at] == inits[2].error

    def test_returns_the_best_iterate(self):
        """At 2 bits the error turns up again; what is returned is that of the turning point."""
        weight, x = with_outliers(0, 256, 256)
        own = lk.InputStatistics.from_inputs(x)
        init = lk.loftq_init(weight, "nf2", 16, 12, statistics=own)
        at = init.weighted_errors.index(min(init.weighted_errors))
        assert at < 11
        shorter = lk.loftq_init(weight, "nf2", 16, at + 1, statistics=own)
        assert torch.equal(shorter.lora_A, init.lora_A) and same_packed(shorter.packed, init.packed)

    def test_an_alternation_by_hand(self):
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        product, errors = torch.zeros(96, 128, dtype=torch.float64), []
        for _ in range(3):
            quantized = lk.quantize((weight.double() - product).float(), "nf4").dequantize(torch.float64)
            product = cholesky_form(weight.double() - quantized, own.gram, 8)
            errors.append(output_error(weight, quantized + product, x))
        init = lk.loftq_init(weight, "nf4", 8, 3, statistics=own)
        assert init.weighted_errors == pytest.approx(errors, rel=1e-4)  # a tie may go another way

    def test_svd_first(self):
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        init = lk.loftq_init(weight, "nf2", 16, 4, statistics=own, order="svd_first")
        assert init.weighted_error == pytest.approx(output_error(weight, dense_of(init), x), rel=1e-9)
        low_rank = cholesky_form(weight.double(), own.gram, 16)
        quantized = lk.quantize((weight.double() - low_rank).float(), "nf2").dequantize(torch.float64)
        first = output_error(weight, quantized + low_rank, x)
        assert init.weighted_errors[0] == pytest.approx(first, rel=1e-4)

    def test_batches_change_nothing(self, monkeypatch):
        """Also where several go through together, as on a GPU, and some share their statistics."""
        problems = [with_outliers(seed) for seed in range(3)]
        own = [lk.InputStatistics.from_inputs(x) for _, x in problems]
        weights, own = [w for w, _ in problems] + [problems[2][0].flip(0)], [*own, own[2]]
        single = [lk.loftq_init(w, "nf2", 8, 3, statistics=s) for w, s in zip(weights, own, strict=True)]
        factored = []
        gram_factor = gram_driver.gram_factor
        monkeypatch.setattr(weighted, "gram_factor", lambda *a: factored.append(1) or gram_factor(*a))
        for chunk in (1, 8):
            monkeypatch.setattr(engine, "chunk_size", lambda *_, chunk=chunk: chunk)
            factored.clear()
            for one, other in zip(single, lk.loftq_init_batch(weights, "nf2", 8, 3, statistics=own), strict=True):
                assert same_packed(one.packed, other.packed)
                torch.testing.assert_close(dense_of(one), dense_of(other), rtol=0, atol=1e-6)
            assert len(factored) == 3, "a common Gram matrix is factored once"

    def test_scales_that_stop_fitting(self, monkeypatch):
        """W fits float16 scales, W less a low-rank term does not: the best iterate so far, while neighbours go on."""
        problems = [with_outliers(seed) for seed in range(2)]
        own = [lk.InputStatistics.from_inputs(x) for _, x in problems]
        weights = [w for w, _ in problems]
        weights[0] = weights[0] * (65500 / weights[0].abs().max())
        alone = lk.loftq_init(weights[1], "nf2", 16, 4, statistics=own[1])
        monkeypatch.setattr(engine, "chunk_size", lambda *_: 8)
        stopped, other = lk.loftq_init_batch(weights, "nf2", 16, 4, statistics=own)
        assert same_packed(other.packed, alone.packed) and len(other.errors) == 4
        assert 1 <= len(stopped.weighted_errors) < 4 and stopped.weighted_error == min(stopped.weighted_errors)
        assert torch.isfinite(dense_of(stopped)).all()
        with pytest.raises(ValueError, match=r"weights\[0\] row .* does not fit torch.float16"):
            lk.loftq_init_batch([2 * weights[0], weights[1]], "nf2", 16, 4, statistics=own)

    def test_without_statistics_nothing_changes(self):
        init = lk.loftq_init(gaussian(64, 64), "nf2", 8, 2)
        assert init.weighted_error is None and init.weighted_errors == []

    def test_on_a_layer_of_minilm(self):
        """Inputs that a real weight of the model makes: output error eora < loftq < round to nearest."""
        weights = minilm_weights()
        x = torch.relu(gaussian(2000, 384) @ weights["encoder.layer.0.intermediate.dense"].T).double()
        weight = weights["encoder.layer.0.output.dense"]
        own = lk.InputStatistics.from_inputs(x)
        eora = lk.eora_init(weight, own, "nf2", 16)
        plain = lk.loftq_init(weight, "nf2", 16, 5)
        rounded = output_error(weight, lk.quantize(weight, "nf2").dequantize(), x)
        assert eora.weighted_error < output_error(weight, dense_of(plain), x) < rounded


class TestRefused:
    def eora(self, message, kind=ValueError, weight=None, statistics=None, **options):
        own = lk.InputStatistics.from_inputs(gaussian(200, 64)) if statistics is None else statistics
        with pytest.raises(kind, match=message):
            lk.eora_init(gaussian(96, 64) if weight is None else weight, own, **options)

    def test_options(self):
        self.eora("rank=65", rank=65)
        self.eora("scaling=0", scaling=0)
        self.eora("svd='full'", svd="full")
        self.eora("unknown format 'nf5'", format="nf5")
        self.eora("group_size=48", group_size=48)
        self.eora("meta", device="meta")

    def test_statistics(self):
        own = lk.InputStatistics.from_inputs(gaussian(200, 32))
        self.eora("statistics of .*32 channels, the weight has 64 columns", statistics=own)
        self.eora("InputStatistics, got Tensor", TypeError, statistics=torch.eye(64))
        own = lk.InputStatistics.from_inputs(gaussian(200, 64))
        own.gram[3, 3] = torch.nan
        self.eora("gram holds NaN or Inf", statistics=own)
        own.gram[3, 3] = -1
        self.eora(r"gram of weights\[0\] is no Gram matrix", statistics=own)
        with pytest.raises(ValueError, match="1 statistics for 2 weights"):
            lk.loftq_init_batch([gaussian(64, 64)] * 2, statistics=[own])

    def test_weights(self):
        weight = gaussian(96, 64)
        weight[5, 7] = torch.nan
        self.eora("nan in row 5, column 7", weight=weight)
        self.eora("nan in row 5, column 7", weight=weight, packed=lk.quantize(gaussian(96, 64)))
        self.eora("does not fit torch.float16", weight=gaussian(96, 64) * 1e20)
        self.eora("1e-20.*do not fit torch.float16", weight=gaussian(96, 64).sign() * 1e-20)

    def test_packed(self):
        self.eora(r"packed has shape \(64, 64\), the weight \(96, 64\)", packed=lk.quantize(gaussian(64, 64)))
        self.eora("PackedTensor, got Tensor", TypeError, packed=gaussian(96, 64))
        self.eora("rank=65", packed=lk.quantize(gaussian(96, 64)), rank=65)

    def test_weighted_low_rank(self):
        residual, gram = problem(8, 16)
        for changes, message in [
            ({"rank": 9}, "rank=9"),
            ({"gram": gram[:3, :3]}, r"gram has shape \(3, 3\)"),
            ({"gram": gram / 0}, "gram holds NaN or Inf"),
            ({"residual": residual / 0}, "residual holds NaN or Inf"),
            ({"svd": "none"}, "svd='none'"),
        ]:
            with pytest.raises(ValueError, match=message):
                lk.weighted_low_rank(**{"residual": residual, "gram": gram, "rank": 2, **changes})
