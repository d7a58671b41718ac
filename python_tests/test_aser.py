"""ASER: what whitening and smoothing are worth, the automatic rank, and which channels are smoothed."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICES, FORMATS, dense_of, gaussian, output_error, same_packed, tiny_model, with_outliers
from torch import Tensor

import loftq_kernels as lk
from loftq_kernels.initializers import aser
from loftq_kernels.initializers.drivers import low_rank


def eight_bits(x: Tensor) -> Tensor:
    """Symmetric 8-bit integers, one scale per token."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def error_at_8_bits(weight: Tensor, init: lk.AdapterInit, x: Tensor) -> float:
    """The way `AdapterInit.smoothing` is to be used: y = q8(x / m) @ ((Q + s B A) diag(m)).T"""
    smoothing = 1.0 if init.smoothing is None else init.smoothing.double()
    return output_error(weight, dense_of(init) * smoothing, x, eight_bits(x / smoothing))


@pytest.mark.parametrize("format", ["int4_sym", "nf4", "int4"])
@pytest.mark.parametrize("seed", range(3))
def test_smoothed_whitened_svd_rounded(format, seed):
    """The paper's order at 4-bit weights and 8-bit activations, on calibration data and on others."""
    weight, x = with_outliers(seed, 128, 128, tokens=4000)
    x, held_out = x[:3000], x[3000:]
    own = lk.InputStatistics.from_inputs(x)
    rounded = lk.quantize(weight, format).dequantize()
    plain = lk.loftq_init(weight, format, 16, 1, svd="exact")
    whitened = lk.aser_init(weight, own, format, 16, outlier_channels=0)
    smoothed = lk.aser_init(weight, own, format, 16)
    for data in (x, held_out):
        errors = [error_at_8_bits(weight, init, data) for init in (smoothed, whitened, plain)]
        errors.append(output_error(weight, rounded, data, eight_bits(data)))
        assert errors[0] < 0.95 * errors[1] and errors[1] < 0.9 * errors[2] and errors[2] < errors[3], errors


def test_whitened_is_eora():
    """Both papers minimise the same error; without outlier channels the results are the same."""
    weight, x = with_outliers()
    own = lk.InputStatistics.from_inputs(x)
    aser, eora = lk.aser_init(weight, own, "nf2", 8, outlier_channels=0), lk.eora_init(weight, own, "nf2", 8)
    assert torch.equal(aser.lora_A, eora.lora_A) and aser.smoothing is None


class TestOutlierChannels:
    @pytest.mark.parametrize("format", FORMATS)
    def test_left_out_of_the_packed_weight(self, format):
        """Of it remains, at most, the half step by which an affine format misses zero."""
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        init = lk.aser_init(weight, own, format, 16, outlier_channels=6)
        strength = x.abs().mean(0) * weight.double().abs().mean(0)
        channels = strength.topk(6).indices
        dense = init.packed.dequantize()
        if format.startswith(("nf", "int")):  # no entry of a uniform code book is zero
            step = init.packed.scale.float().max() if init.packed.format.affine else 0
            assert dense[:, channels].abs().max() <= 0.51 * step
        zeroed = weight.clone()
        zeroed[:, channels] = 0
        assert same_packed(init.packed, lk.quantize(zeroed, format))
        smoothing = torch.ones(128, dtype=torch.float64)
        smoothing[channels] = x.abs().mean(0)[channels] / x.abs().mean(0)[channels].min()
        torch.testing.assert_close(init.smoothing.double(), smoothing, rtol=1e-6, atol=0)
        assert init.smoothing.dtype == torch.float32 and (init.smoothing >= 1).all()
        assert init.weighted_error == pytest.approx(output_error(weight, dense_of(init), x), rel=1e-9)

    def test_stretch_no_scale(self):
        """A column 30 times larger would cost its groups of an absmax format all precision."""
        weight, x = with_outliers(0, 128, 128)
        channel = int((x.abs().mean(0) * weight.double().abs().mean(0)).argmax())
        weight[:, channel] *= 30
        own = lk.InputStatistics.from_inputs(x)
        smoothed, whitened = (lk.aser_init(weight, own, "nf4", 16, outlier_channels=f) for f in (1, 0))
        assert smoothed.weighted_error < 0.5 * whitened.weighted_error

    @pytest.mark.parametrize(("rank", "asked", "taken"), [(16, 32, 8), (64, 32, 32), (1, 32, 0), (16, 3, 3)])
    def test_at_most_half_the_rank(self, rank, asked, taken):
        weight, x = with_outliers(0, 128, 128)
        init = lk.aser_init(weight, lk.InputStatistics.from_inputs(x), "nf4", rank, outlier_channels=asked)
        channels = 0 if init.smoothing is None else int((init.packed.dequantize() == 0).all(0).sum())
        assert channels == taken

    def test_dead_channels_are_none(self):
        """Fewer live channels than asked for: m stays finite."""
        weight, x = with_outliers()
        x[:, 3:] = 0
        own = lk.InputStatistics.from_inputs(x)
        assert len(aser.outlier_channels_of(weight, own, 8)) == 3
        init = lk.aser_init(weight, own, "nf4", 16, outlier_channels=8)
        assert torch.isfinite(init.smoothing).all() and init.weighted_error < 1e-6

    @pytest.mark.parametrize("device", DEVICES)
    def test_devices(self, device):
        weight, x = with_outliers()
        own = lk.InputStatistics.from_inputs(x)
        here, there = (lk.aser_init(weight, own, "nf2", 8, device=d) for d in (None, device))
        assert same_packed(here.packed, there.packed) and torch.equal(here.smoothing, there.smoothing)
        moved = there.to(device)
        assert moved.smoothing.device.type == moved.lora_A.device.type == device
        torch.testing.assert_close(dense_of(here), dense_of(there), rtol=0, atol=1e-6)


class TestRankByEnergy:
    def test_rule(self):
        singular = torch.tensor([4.0, 3.0, 2.0, 1.0])
        for energy, rank in [(0.1, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.75, 3), (0.95, 4), (1.0, 4)]:
            assert low_rank.rank_for_energy(singular, energy, 4) == rank, energy
        assert low_rank.rank_for_energy(singular, 1.0, 2) == 2, "the most is kept"
        assert low_rank.rank_for_energy(torch.zeros(4), 0.5, 4) == 1, "nothing to hold: the smallest adapter"

    @pytest.mark.parametrize("shape", [(96, 128), (128, 96)], ids=str)
    def test_is_the_least_rank_that_holds_it(self, shape):
        weight, x = with_outliers(0, *shape)
        own = lk.InputStatistics.from_inputs(x)
        ranks = []
        for energy in (0.3, 0.5, 0.8):
            init = lk.aser_init(weight, own, "nf4", 96, rank_energy=energy, outlier_channels=0)
            residual = weight.double() - init.packed.dequantize(torch.float64)
            singular = torch.linalg.svdvals(residual @ torch.linalg.cholesky(own.gram))
            share = singular.cumsum(0) / singular.sum()
            rank = init.lora_A.shape[0]
            assert init.lora_B.shape[1] == rank
            assert share[rank - 1] >= energy and (rank == 1 or share[rank - 2] < energy)
            error = singular[rank:].norm() / (weight.double() @ torch.linalg.cholesky(own.gram)).norm()
            assert init.weighted_error == pytest.approx(error.item(), rel=1e-5)
            assert init.weighted_errors == [init.weighted_error] and init.errors == [init.error]
            ranks.append(rank)
        assert ranks == sorted(set(ranks))

    def test_whole_models(self, tmp_path):
        """Layers get different ranks, at most cfg.rank; the model saves and loads."""
        model = tiny_model()
        x = gaussian(500, 64)
        x[:, :3] *= 20
        own = lk.collect_activations(model, [x], lk.QuantConfig(exclude=()), progress=False)
        cfg = lk.QuantConfig(init="aser", rank=10, rank_energy=0.3, lora_alpha=20, exclude=(), overrides={"head": None})
        report = lk.quantize_model(model, cfg, statistics=own, progress=False)
        ranks = {layer.rank for layer in report.layers}
        assert len(ranks) > 1 and max(ranks) <= 10
        assert {m.scaling for m in model.modules() if isinstance(m, lk.QuantLoRALinear)} == {2.0}
        lk.save_quantized(model, tmp_path)
        with torch.device("meta"):
            other = tiny_model()
        loaded = lk.load_quantized(tmp_path, other)
        assert [m.rank for m in loaded.modules() if isinstance(m, lk.QuantLoRALinear)] == [
            layer.rank for layer in report.layers
        ]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rank_energy": 0}, ValueError, "rank_energy=0"),
        ({"rank_energy": 1.5}, ValueError, r"rank_energy=1\.5"),
        ({"rank_energy": float("nan")}, ValueError, "rank_energy=nan"),
        ({"rank_energy": True}, ValueError, "rank_energy=True"),
        ({"outlier_channels": -1}, ValueError, "outlier_channels=-1"),
        ({"outlier_channels": 1.0}, TypeError, r"outlier_channels=1\.0 must be an integer"),
    ],
    ids=str,
)
def test_refused(options, kind, message):
    own = lk.InputStatistics.from_inputs(gaussian(200, 64))
    with pytest.raises(kind, match=message):
        lk.aser_init(gaussian(64, 64), own, **options)
    with pytest.raises(kind, match=message):
        lk.QuantConfig(init="aser", **options)


def test_refused_statistics():
    own = lk.InputStatistics.from_inputs(gaussian(200, 32))
    with pytest.raises(ValueError, match="statistics of weight have 32 channels, the weight has 64"):
        lk.aser_init(gaussian(64, 64), own)
    with pytest.raises(ValueError, match="rank=65"):
        lk.aser_init(gaussian(64, 64), own, rank=65)
