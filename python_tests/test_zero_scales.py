"""Scales that round to zero: what they lose must be nothing beside the matrix, with an adapter and without."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BACKENDS, gaussian

import loftq_kernels as lk

FORMATS = ("nf4", "int8", "int4", "int2", "int8_sym" if "int8_sym" in lk.format_names() else "int4_sym")


def initialized(weight: torch.Tensor, format: str, rank: int | None, group_size: int, backend: str) -> torch.Tensor:
    """The float64 matrix that a layer would compute with."""
    if rank is None:
        return lk.quantize(weight, format, group_size, backend=backend).dequantize(torch.float64)
    init = lk.loftq_init(weight, format, rank, 2, group_size=group_size, backend=backend)
    return init.packed.dequantize(torch.float64) + init.lora_B.double() @ init.lora_A.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("format", FORMATS)
def test_nearly_dead_rows(format, group_size, rank, backend):
    """Any magnitude of three rows, down to subnormals of float16 and below: the others decide what is lost."""
    weight = gaussian(37, 96) * 0.02
    expected = initialized(weight, format, rank, group_size, backend)
    for magnitude in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9, 1e-20, 0.0):
        faded = weight.clone()
        faded[[0, 5, 36]] *= magnitude
        dense = initialized(faded, format, rank, group_size, backend)
        error, usual = (dense - faded).norm() / faded.norm(), (expected - weight).norm() / weight.norm()
        assert error <= 1.1 * usual + 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_matter(format, rank, backend):
    """Each entry is small beside the largest, all of them together are not: an error that says what helps."""
    weight = gaussian(64, 256) * 2e-9
    weight[7, 3] = 1e-5
    with pytest.raises(ValueError, match="row .*float16; use scale_dtype=torch.float32"):
        initialized(weight, format, rank, 64, backend)
    assert lk.quantize(weight, format, scale_dtype=torch.float32).dequantize()[0].any()


class TestManyScales:
    """More scales than are looked at in one piece: the fault may be in any of them."""

    WEIGHT = gaussian(300, 4096)  # 38400 groups of 32

    @pytest.mark.parametrize("row", [0, 151, 299])
    @pytest.mark.parametrize("format", ["nf4", "int4"])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_weight_that_is_not_finite(self, row, format, value):
        weight = self.WEIGHT.clone()
        weight[row, 4095] = value
        with pytest.raises(ValueError, match=rf"holds {value} in row {row}, column 4095"):
            lk.quantize(weight, format, 32)

    @pytest.mark.parametrize("row", [0, 151, 299])
    def test_a_row_whose_scales_round_to_zero(self, row):
        weight = 1e-7 * self.WEIGHT
        lk.quantize(weight, "nf4", 32)
        weight[row] *= 0.05  # below float16's least number, and half a percent of the matrix's norm
        with pytest.raises(ValueError, match=rf"row {row}, group \d+: .*does not fit torch.float16"):
            lk.quantize(weight, "nf4", 32)
