"""LoftQ: the alternation against a plain one with a full SVD, its promises, and both solvers on real weights."""

from __future__ import annotations

import functools
import math
import os
import re
import signal
import threading

import oracle
import pytest
import torch
from helpers import BACKENDS, DEVICES, FORMATS, gaussian, minilm_inits, minilm_weights, same_packed

import loftq_kernels as lk
from loftq_kernels.initializers import engine, options, parallel
from loftq_kernels.initializers.drivers import low_rank

RANKS = [8, 16, 64]
SOLVERS = ["exact", "fast"]


DRIVERS = [(backend, "cpu") for backend in BACKENDS] + [pytest.param((None, "cuda"), marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True, params=DRIVERS, ids=str)
def driver(request, monkeypatch) -> str | None:
    """Every test runs with the driver in plain torch, where it is built with the compiled one, and that on a GPU."""
    backend, device = request.param
    for name in ("loftq_init", "loftq_init_batch"):
        monkeypatch.setattr(lk, name, functools.partial(getattr(lk, name), backend=backend, device=device))
    return backend


def assert_solvers_agree(exact: lk.AdapterInit, fast: lk.AdapterInit) -> None:
    """After one alternation and at the end, within 0.2% of each other (the fast one may be lucky, too); 0.3% where
    "auto" would not take the fast one."""
    mode = low_rank.resolve_mode("auto", fast.lora_A.shape[0], min(fast.packed.shape))
    limit = 1.002 if mode == "fast" else 1.003
    assert fast.errors[0] <= limit * exact.errors[0]
    assert fast.error <= limit * exact.error
    # At T = 1 nothing beats the truncated SVD. Errors on the way are estimates where the operands are bfloat16.
    assert exact.errors[0] <= fast.errors[0] * (1 + 1e-4)


class TestSolvers:
    """exact and fast; T = 1 is the first of the errors that T = 5 reports."""

    @pytest.mark.slow
    @pytest.mark.parametrize("rank", RANKS)
    @pytest.mark.parametrize("format", ["nf4", "nf2"])
    def test_minilm(self, format, rank, driver):
        exact = minilm_inits(format, rank, "exact", backend=BACKENDS[-1])
        fast = minilm_inits(format, rank, "fast", backend=driver)
        for name in minilm_weights():
            assert_solvers_agree(exact[name], fast[name])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("size", "format", "rank"),
        [(512, "nf4", 8), (512, "nf2", 16), (512, "nf2", 64), (1024, "nf4", 16), (1024, "nf2", 64)],
    )
    def test_random(self, size, format, rank):
        weight = gaussian(size, size, seed=size + rank) / 50
        assert_solvers_agree(*(lk.loftq_init(weight, format, rank, 5, svd=svd) for svd in SOLVERS))

    @pytest.mark.slow
    def test_random_2048(self):
        weight = gaussian(2048, 2048) / 50
        assert_solvers_agree(*(lk.loftq_init(weight, "nf2", 16, 2, svd=svd) for svd in SOLVERS))

    @pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
    def test_low_rank_with_noise(self, shape):
        """Trained weights are not noise: a steep head of the spectrum above a flat tail."""
        weight = gaussian(shape[0], 12) @ gaussian(12, shape[1], seed=1) / 4 + gaussian(*shape, seed=2)
        assert_solvers_agree(*(lk.loftq_init(weight, "nf2", 8, 5, svd=svd) for svd in SOLVERS))

    def test_one_alternation_is_the_first_of_five(self):
        weight = gaussian(96, 64)
        for svd in SOLVERS:
            one, five = (lk.loftq_init(weight, "nf2", 4, num_iter, svd=svd) for num_iter in (1, 5))
            assert (
                one.errors == pytest.approx(five.errors[:1], rel=1e-6 if svd == "exact" else 3e-4)
                and len(five.errors) == 5
            )


@pytest.mark.parametrize("format", ["nf4", "nf2", "int4", "int2"])
def test_better_than_rounding_on_every_minilm_layer(format, driver):
    for name, init in minilm_inits(format, 16, backend=driver).items():
        weight = minilm_weights()[name]
        rounded = weight - lk.quantize(weight, format).dequantize()
        assert init.error < (rounded.norm() / weight.norm()).item(), name


@pytest.mark.parametrize("format", ["nf4", "nf2"])
def test_more_rank_is_better_on_every_minilm_layer(format, driver):
    errors = [minilm_inits(format, rank, backend=driver) for rank in RANKS]
    for name in minilm_weights():
        assert errors[0][name].error > errors[1][name].error > errors[2][name].error


class TestAgainstPeft:
    """PEFT's loop: full SVD, every iterate. Groups are LoftQ's flat blocks of 64 where K is a multiple of 64."""

    def quantizer(self, format):
        if format == "nf4":
            bnb = pytest.importorskip("bitsandbytes.functional")
            return lambda w: bnb.dequantize_4bit(*bnb.quantize_4bit(w.contiguous(), blocksize=64, quant_type="nf4"))
        table = torch.from_numpy(oracle.codebook(format))
        return lambda w: oracle.loftq_nearest(w, table, lambda blocks: blocks.abs().amax(-1, keepdim=True))

    @pytest.mark.parametrize("format", ["nf4", "nf2"])
    def test_errors_of_every_alternation(self, format):
        weight = minilm_weights()["encoder.layer.2.attention.self.value"]
        iterates = oracle.loftq_loop(weight, 16, 5, self.quantizer(format))
        theirs = [((weight - q - low_rank).norm() / weight.norm()).item() for q, low_rank in iterates]
        ours = lk.loftq_init(weight, format, 16, 5, svd="exact", scale_dtype=torch.float32)
        assert ours.errors[0] == pytest.approx(theirs[0], rel=1e-5)
        # A weight that ties goes one way here, another there; the alternations drift apart by very little.
        assert ours.errors == pytest.approx(theirs, rel=2e-3)

    @pytest.mark.parametrize("shape", [(96, 128), (128, 64)], ids=str)
    def test_product_of_one_alternation(self, shape):
        weight = gaussian(*shape)
        ((quantized, low_rank),) = oracle.loftq_loop(weight, 8, 1, self.quantizer("nf4"))
        init = lk.loftq_init(weight, "nf4", 8, 1, svd="exact", scale_dtype=torch.float32)
        assert torch.equal(init.packed.dequantize(), quantized)
        torch.testing.assert_close(init.lora_B @ init.lora_A, low_rank, rtol=0, atol=1e-5)

    def test_factors_are_split_evenly(self):
        """B = U sqrt(S), A = sqrt(S) V^T: equal, diagonal Gram matrices."""
        init = lk.loftq_init(gaussian(96, 128), "nf2", 8, 3, svd="exact")
        left, right = init.lora_B.T @ init.lora_B, init.lora_A @ init.lora_A.T
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)
        assert (left - left.diag().diag()).abs().max() < 1e-3 * left.max()


@pytest.mark.parametrize("svd", ["auto", *SOLVERS])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (77, 130), (130, 77)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_promises(format, shape, svd):
    """The error reported is the error there is; the best iterate is returned; an adapter is never worse than none."""
    weight = gaussian(*shape, seed=3)
    init = lk.loftq_init(weight, format, 8, 4, svd=svd)
    assert init.lora_A.shape == (8, shape[1]) and init.lora_B.shape == (shape[0], 8)
    assert init.lora_A.dtype == init.lora_B.dtype == torch.float32
    assert init.lora_A.is_contiguous() and init.lora_B.is_contiguous()
    assert len(init.errors) == 4 and init.error == min(init.errors)
    assert init.error == pytest.approx(oracle.relative_error(weight, init), rel=1e-5)
    alone = ((weight - init.packed.dequantize()).norm() / weight.norm()).item()
    assert init.error <= alone * (1 + 1e-6)
    rounded = ((weight - lk.quantize(weight, format).dequantize()).norm() / weight.norm()).item()
    assert init.errors[0] < rounded


@pytest.mark.parametrize("order", options.ORDERS)
@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("format", ["nf2", "int4", "uniform2"])
def test_drivers_agree(format, svd, order):
    """The compiled driver finds what the one in plain torch finds."""
    for shape in ((96, 160), (160, 96)):
        weight = gaussian(*shape, seed=3)
        reference = lk.loftq_init(weight, format, 8, 4, svd=svd, order=order, backend="reference")
        init = lk.loftq_init(weight, format, 8, 4, svd=svd, order=order)
        assert init.errors == pytest.approx(reference.errors, rel=3e-3)
        if order == "quantize_first":
            assert init.errors[0] == pytest.approx(reference.errors[0], rel=1e-5 if svd == "exact" else 1e-3)


@pytest.mark.parametrize("rank", [1, 33])
@pytest.mark.parametrize("svd", SOLVERS)
def test_extreme_ranks(rank, svd):
    """Rank min(N, K) leaves nothing but rounding."""
    weight = gaussian(33, 70)
    init = lk.loftq_init(weight, "nf4", rank, 1, svd=svd)
    # At full rank the error is a difference of two equal float32 norms: zero to within their rounding.
    assert init.error == pytest.approx(oracle.relative_error(weight, init), rel=1e-4, abs=1e-5)
    if rank == 33:
        assert init.error < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("svd", SOLVERS)
def test_tiny_shapes(shape, svd):
    init = lk.loftq_init(gaussian(*shape), "nf2", 1, 2, svd=svd)
    assert math.isfinite(init.error) and init.lora_A.isfinite().all() and init.lora_B.isfinite().all()
    assert init.error == pytest.approx(oracle.relative_error(gaussian(*shape), init), rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("order", options.ORDERS)
@pytest.mark.parametrize("scaling", [0.25, 0.5, 2, 11.3])
def test_scaling_is_folded_in(scaling, order):
    """Whatever the module multiplies the adapter by, what it computes is what was minimised."""
    weight = gaussian(64, 96)
    plain, scaled = (lk.loftq_init(weight, "nf2", 8, 3, scaling=s, order=order, svd="exact") for s in (1, scaling))
    assert scaled.scaling == scaling and same_packed(plain.packed, scaled.packed)
    assert scaled.errors == plain.errors
    torch.testing.assert_close(scaled.lora_A * scaling**0.5, plain.lora_A)
    torch.testing.assert_close(scaled.lora_B * scaling**0.5, plain.lora_B)
    layer = lk.QuantLoRALinear.from_init(scaled)
    computed = layer(torch.eye(96)).detach().T
    assert ((weight - computed).norm() / weight.norm()).item() == pytest.approx(plain.error, rel=1e-5)


class TestOrder:
    def test_svd_first(self):
        """The low-rank part of W first, then what is left is quantized: by hand for one alternation."""
        weight = gaussian(64, 96)
        init = lk.loftq_init(weight, "nf4", 8, 1, order="svd_first", svd="exact", scale_dtype=torch.float32)
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        low_rank = ((u[:, :8] * s[:8]) @ vh[:8]).float()
        torch.testing.assert_close(init.lora_B @ init.lora_A, low_rank, rtol=0, atol=1e-5)
        expected = weight - low_rank - lk.quantize(weight - low_rank, "nf4", scale_dtype=torch.float32).dequantize()
        assert init.error == pytest.approx((expected.norm() / weight.norm()).item(), rel=1e-3)

    @pytest.mark.parametrize("svd", SOLVERS)
    @pytest.mark.parametrize("shape", [(64, 96), (96, 64)], ids=str)
    def test_promises_hold(self, shape, svd):
        weight = gaussian(*shape)
        init = lk.loftq_init(weight, "nf2", 8, 4, order="svd_first", svd=svd)
        assert init.error == min(init.errors) and len(init.errors) == 4
        assert init.error == pytest.approx(oracle.relative_error(weight, init), rel=1e-5)


@pytest.mark.parametrize("format", ["nf4", "nf2", "int2", "uniform2"])
@pytest.mark.parametrize("svd", SOLVERS)
def test_iterations_help(svd, format):
    for seed, rank in ((0, 2), (1, 8), (2, 32)):
        weight = gaussian(256, 200, seed=seed)
        one, five = (lk.loftq_init(weight, format, rank, num_iter, svd=svd) for num_iter in (1, 5))
        assert five.error <= one.error


class TestBatch:
    @pytest.mark.parametrize("svd", SOLVERS)
    @pytest.mark.parametrize("shape", [(96, 160), (160, 96)], ids=str)
    def test_each_as_if_alone(self, shape, svd):
        weights = [gaussian(*shape, seed=seed) * magnitude for seed, magnitude in ((0, 1.0), (1, 1e-3), (2, 50.0))]
        weights.append(torch.zeros(shape))
        together = lk.loftq_init_batch(weights, "nf2", 8, 3, svd=svd)
        stacked = lk.loftq_init_batch(torch.stack(weights), "nf2", 8, 3, svd=svd)
        for i, weight in enumerate(weights):
            alone = lk.loftq_init(weight, "nf2", 8, 3, svd=svd)
            for batched in (together[i], stacked[i]):
                assert batched.errors == pytest.approx(alone.errors, rel=1e-5)
                torch.testing.assert_close(
                    batched.packed.dequantize() + batched.lora_B @ batched.lora_A,
                    alone.packed.dequantize() + alone.lora_B @ alone.lora_A,
                    rtol=1e-3,
                    atol=1e-3 * weight.abs().max().item(),
                )

    @pytest.mark.parametrize("device", DEVICES)
    def test_in_chunks(self, device, monkeypatch):
        """A GPU takes as many matrices at a time as its workspace holds, a CPU one after another."""
        weights = [gaussian(32, 64, seed=seed, device=device) for seed in range(5)]
        whole, told = lk.loftq_init_batch(weights, "nf2", 4, 2), []
        monkeypatch.setattr(engine, "workspace_bytes", lambda device: 2 * parallel.WORKSPACE_COPIES * 4 * 32 * 64)
        chunked = lk.loftq_init_batch(weights, "nf2", 4, 2, progress=told.append)
        assert told == ([1] * 5 if device == "cpu" else [2, 2, 1])
        for a, b in zip(whole, chunked, strict=True):
            assert a.errors == pytest.approx(b.errors, rel=1e-5)

    def test_scales_that_overflow_on_the_way(self, monkeypatch):
        """A matrix whose scales stop fitting in a later iterate stays at its best; its neighbour is not affected."""
        weights = [gaussian(128, 128) * 20, gaussian(128, 128, seed=1).clamp(-1, 1) * 65500]
        alone = [lk.loftq_init(weight, "nf2", 8, 5) for weight in weights]
        monkeypatch.setattr(engine, "chunk_size", lambda *_: 2)
        together = lk.loftq_init_batch(weights, "nf2", 8, 5)
        assert len(alone[0].errors) == 5
        assert len(alone[1].errors) < 5, "the case is not there any more"
        for weight, a, b in zip(weights, alone, together, strict=True):
            assert a.errors == pytest.approx(b.errors, rel=1e-4)
            assert all(map(math.isfinite, a.errors)) and a.error == min(a.errors)
            assert b.error == pytest.approx(oracle.relative_error(weight, b), rel=1e-4)

    @pytest.mark.parametrize("shape", [(256, 300), (300, 256)], ids=str)
    @pytest.mark.parametrize("order", options.ORDERS)
    @pytest.mark.parametrize("svd", ["exact", "fast"])
    def test_together_on_a_cpu(self, svd, order, shape, monkeypatch):
        """What a GPU runs: the driver with several matrices in one call, one of them zero, one in need of a unit."""
        weights = [gaussian(*shape, seed=seed) * scale for seed, scale in enumerate((1.0, 0.0, 1e-12, 0.02))]
        options = {"svd": svd, "order": order, "scale_dtype": torch.float32}
        alone = lk.loftq_init_batch(weights, "nf2", 8, 3, **options)
        monkeypatch.setattr(engine, "chunk_size", lambda *_: 3)
        told = []
        together = lk.loftq_init_batch(weights, "nf2", 8, 3, **options, progress=told.append)
        assert told == [3, 1]
        for weight, a, b in zip(weights, alone, together, strict=True):
            assert a.errors == pytest.approx(b.errors, rel=1e-5)
            dense = b.packed.dequantize() + b.lora_B @ b.lora_A
            assert (weight - dense).norm().item() == pytest.approx(b.error * weight.norm().item(), rel=1e-4)

    def test_empty(self):
        assert lk.loftq_init_batch([]) == []

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (torch.zeros(65, 96), r"shape: weights\[1\] has .*65, 96.*weights\[0\] has .*64, 96"),
            (torch.zeros(64, 96, dtype=torch.float16), "dtype: .*torch.float16.*torch.float32"),
        ],
    )
    def test_mixed(self, other, message):
        with pytest.raises(ValueError, match=message):
            lk.loftq_init_batch([gaussian(64, 96), other])

    def test_names_in_errors(self):
        weights = [gaussian(64, 96), gaussian(64, 96)]
        weights[1][3, 5] = math.nan
        with pytest.raises(ValueError, match=r"encoder\.1 .*nan.*row 3"):
            lk.loftq_init_batch(weights, names=["encoder.0", "encoder.1"])


def test_a_seed_fixes_the_result():
    weight = gaussian(200, 160)
    first, again, other = (lk.loftq_init(weight, "nf2", 4, 2, svd="fast", seed=seed) for seed in (3, 3, 4))
    assert same_packed(first.packed, again.packed) and first.errors == again.errors
    assert torch.equal(first.lora_A, again.lora_A) and torch.equal(first.lora_B, again.lora_B)
    assert not torch.equal(first.lora_A, other.lora_A)
    state = torch.random.get_rng_state()
    lk.loftq_init(weight, "nf2", 4, 2, svd="fast")
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is not touched"


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
@pytest.mark.parametrize("format", ["nf4", "int4", "uniform2"])
def test_extreme_magnitudes(format, magnitude, svd):
    weight = gaussian(96, 64)
    plain, extreme = (
        lk.loftq_init(weight * factor, format, 8, 3, svd=svd, scale_dtype=torch.float32) for factor in (1, magnitude)
    )
    assert extreme.errors == pytest.approx(plain.errors, rel=1e-3 if svd == "exact" else 4e-3)
    assert extreme.error == pytest.approx(oracle.relative_error(weight * magnitude, extreme), rel=1e-4)


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("format", FORMATS)
def test_zero_matrix(format, svd):
    init = lk.loftq_init(torch.zeros(64, 96), format, 8, 3, svd=svd)
    assert init.error == 0 and not init.packed.dequantize().any()
    assert not (init.lora_B @ init.lora_A).any() and init.lora_A.isfinite().all() and init.lora_B.isfinite().all()


@pytest.mark.parametrize("svd", SOLVERS)
@pytest.mark.parametrize("format", FORMATS)
def test_matrix_with_zero_rows_and_columns(format, svd):
    weight = gaussian(64, 96)
    weight[:8], weight[:, 64:] = 0, 0
    init = lk.loftq_init(weight, format, 8, 3, svd=svd)
    assert init.error == pytest.approx(oracle.relative_error(weight, init), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weight_dtypes(dtype):
    weight = gaussian(64, 96).to(dtype)
    init = lk.loftq_init(weight, "nf4", 8, 2)
    assert init.errors == pytest.approx(lk.loftq_init(weight.float(), "nf4", 8, 2).errors, rel=1e-5)
    assert init.lora_A.dtype == torch.float32


@pytest.mark.parametrize("options", [{"scale_search": True}, {"group_size": -1}, {"group_size": 32}], ids=str)
def test_options_reach_the_quantizer(options):
    weight = gaussian(64, 96)
    init = lk.loftq_init(weight, "nf2", 8, 1, **options)
    assert same_packed(init.packed, lk.quantize(weight, "nf2", **options))


def test_strides_and_grad():
    weight = gaussian(96, 64).T.requires_grad_()
    before = weight.detach().clone()
    init = lk.loftq_init(weight, "nf4", 8, 2)
    plain = lk.loftq_init(before, "nf4", 8, 2)
    assert init.errors == pytest.approx(plain.errors, rel=1e-5)
    assert not init.lora_A.requires_grad and torch.equal(weight.detach(), before)


@pytest.mark.parametrize("device", DEVICES)
def test_device(device):
    """Computed there, returned to where the weight is."""
    weight = gaussian(64, 96)
    init = lk.loftq_init(weight, "nf4", 8, 2, device=device)
    assert init.packed.device.type == "cpu" and init.lora_A.device.type == "cpu"
    assert init.errors == pytest.approx(lk.loftq_init(weight, "nf4", 8, 2).errors, rel=1e-3)
    there = lk.loftq_init(weight.to(device), "nf4", 8, 2)
    assert there.lora_A.device.type == there.packed.device.type == device


class TestBadInput:
    @pytest.mark.parametrize("rank", [0, -3, 65, 1000])
    def test_rank(self, rank):
        with pytest.raises(ValueError, match=rf"rank={rank} is outside 1\.\.64"):
            lk.loftq_init(gaussian(64, 96), "nf4", rank)

    @pytest.mark.parametrize("rank", [1.5, "8", None, True])
    def test_rank_type(self, rank):
        with pytest.raises(TypeError, match=repr(rank)):
            lk.loftq_init(gaussian(64, 96), "nf4", rank)

    @pytest.mark.parametrize("num_iter", [0, -1, 1.5, True, 2**70])
    def test_num_iter(self, num_iter):
        with pytest.raises(ValueError, match=f"num_iter={num_iter!r}"):
            lk.loftq_init(gaussian(64, 96), "nf4", 8, num_iter)

    @pytest.mark.parametrize("scaling", [0, -1.0, math.inf, math.nan, "1", 1e-300, 1e300])
    def test_scaling(self, scaling):
        with pytest.raises(ValueError, match=re.escape(f"scaling={scaling!r}")):
            lk.loftq_init(gaussian(64, 96), scaling=scaling)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"svd": "gesdd"}, "svd='gesdd'"),
            ({"order": "both"}, "order='both'"),
            ({"format": "nf7"}, "unknown format 'nf7'"),
            ({"group_size": 48}, "group_size=48"),
            ({"scale_dtype": torch.int8}, "scale_dtype=torch.int8"),
            ({"seed": 2**70}, "seed=1180591620717411303424 must be an integer"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            lk.loftq_init(gaussian(64, 96), **options)

    @pytest.mark.parametrize("options", [{"svd": "gesdd"}, {"format": "nf7"}, {"scaling": 0}, {"num_iter": 0}], ids=str)
    def test_options_of_an_empty_batch(self, options):
        with pytest.raises(ValueError):
            lk.loftq_init_batch([], **options)

    @pytest.mark.parametrize("magnitude", [1e-36, 1e-44])
    def test_magnitudes_without_scales(self, magnitude):
        with pytest.raises(ValueError, match="too small for float32 scales"):
            lk.loftq_init(gaussian(64, 96) * magnitude, scale_dtype=torch.float32)

    @pytest.mark.parametrize("order", options.ORDERS)
    @pytest.mark.parametrize("svd", SOLVERS)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite(self, bad, svd, order):
        weight = gaussian(64, 96)
        weight[17, 5] = bad
        with pytest.raises(ValueError, match=f"holds {bad} in row 17"):
            lk.loftq_init(weight, svd=svd, order=order)

    @pytest.mark.parametrize("shape", [(64,), (2, 64, 96)], ids=str)
    def test_shape(self, shape):
        with pytest.raises(ValueError, match=r"out_features, in_features"):
            lk.loftq_init(torch.zeros(shape))

    def test_meta_and_integers(self):
        with pytest.raises(ValueError, match="meta device"):
            lk.loftq_init(torch.empty(64, 96, device="meta"))
        with pytest.raises(TypeError, match="torch.int64"):
            lk.loftq_init(torch.zeros(64, 96, dtype=torch.int64))
        with pytest.raises(TypeError, match="float8"):
            lk.loftq_init(torch.zeros(64, 96).to(torch.float8_e4m3fn))

    def test_scales_that_do_not_fit(self):
        with pytest.raises(ValueError, match="float16.*scale_dtype=torch.float32"):
            lk.loftq_init(gaussian(64, 96) * 1e6)


@pytest.mark.parametrize("svd", SOLVERS)
def test_interrupt(svd):
    """Ctrl-C ends it between alternations, which would take minutes in all; a call after that works."""
    weight = gaussian(192, 160)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            lk.loftq_init(weight, "nf2", 8, 100_000, svd=svd)
    finally:
        timer.cancel()
    assert math.isfinite(lk.loftq_init(weight, "nf2", 8, 2, svd=svd).error)


def steep_matrices() -> dict[str, torch.Tensor]:
    """Residuals of low rank, or with one direction far above the others: where the fast solver must not be trusted."""
    single, row = torch.zeros(256, 256), torch.zeros(256, 256)
    single[3, 5], row[3] = 0.7, gaussian(256)
    matrices = {
        "constant": torch.full((96, 160), 0.3),
        "one entry": single,
        "one row": row,
        "equal columns": gaussian(256, 1).expand(256, 256).contiguous(),
        "equal rows": gaussian(1, 256).expand(256, 256).contiguous(),
    }
    for factor in (1e3, 1e4, 1e5):
        matrices[f"row times {factor:g}"] = 0.02 * gaussian(512, 512)
        matrices[f"row times {factor:g}"][7] *= factor
    return matrices


@pytest.mark.parametrize(
    ("shape", "rank"), [((300, 256), 3), ((600, 500), 3), ((256, 300), 8), ((256, 256), 20)], ids=str
)
def test_low_rank_weights_svd_first(shape, rank):
    """Krylov blocks beyond the rank of W are rounding noise, which is not orthogonal to anything."""
    weight = gaussian(shape[0], rank) @ gaussian(rank, shape[1], seed=1)
    for num_iter in (1, 4):
        options = {"order": "svd_first", "scale_dtype": torch.float32}
        fast, exact = (lk.loftq_init(weight, "nf4", 8, num_iter, svd=s, **options) for s in SOLVERS[::-1])
        assert fast.error <= 1.003 * exact.error + 1e-5
        assert fast.error == pytest.approx(oracle.relative_error(weight, fast), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", steep_matrices())
def test_steep_residuals(name, backend):
    """The fast solver ends where the exact one does, or hands over to it; never worse than no adapter."""
    weight = steep_matrices()[name]
    for format in ("nf4", "uniform2"):
        options = {"scale_dtype": torch.float32, "backend": backend}
        plain = (weight - lk.quantize(weight, format, scale_dtype=torch.float32).dequantize()).norm() / weight.norm()
        for num_iter in (1, 5):
            fast, exact = (lk.loftq_init(weight, format, 8, num_iter, svd=s, **options) for s in ("fast", "exact"))
            assert fast.error <= 1.03 * exact.error + 1e-5
            assert fast.error <= plain + 1e-6
