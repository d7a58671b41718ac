"""QLoRA's start: plain rounding and an adapter that adds nothing yet."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from helpers import FORMATS, gaussian, same_packed

import loftq_kernels as lk


@pytest.mark.parametrize("format", FORMATS)
def test_round_to_nearest(format):
    weight = gaussian(33, 130)
    init = lk.qlora_init(weight, format, 4, scaling=2.0)
    assert same_packed(init.packed, lk.quantize(weight, format))
    assert not init.lora_B.any() and init.lora_B.shape == (33, 4) and init.lora_A.shape == (4, 130)
    assert init.error == pytest.approx(oracle.relative_error(weight, init), rel=1e-5)
    assert init.errors == [init.error] and init.scaling == 2.0


def test_lora_A_is_kaiming_uniform():
    """U(-1/sqrt(K), 1/sqrt(K)), what PEFT and nn.Linear draw with a = sqrt(5)."""
    lora_A = lk.qlora_init(gaussian(64, 400), rank=64).lora_A
    bound = 1 / math.sqrt(400)
    assert lora_A.abs().max() <= bound
    kstest = pytest.importorskip("scipy.stats").kstest
    assert kstest(lora_A.flatten().numpy(), "uniform", args=(-bound, 2 * bound)).pvalue > 0.01


def test_seed():
    weight = gaussian(33, 130)
    first, again, other = (lk.qlora_init(weight, rank=4, seed=seed).lora_A for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_adapter():
    weight = gaussian(33, 130)
    init = lk.qlora_init(weight, "nf2", None)
    assert init.lora_A is None and init.lora_B is None
    assert init.error == pytest.approx(oracle.relative_error(weight, init), rel=1e-5)
    assert init.to("cpu").lora_A is None


def test_zero_matrix():
    assert lk.qlora_init(torch.zeros(5, 70), rank=2).error == 0


@pytest.mark.parametrize("rank", [0, -1, 34])
def test_rank(rank):
    with pytest.raises(ValueError, match=f"rank={rank}"):
        lk.qlora_init(gaussian(33, 130), rank=rank)


def test_bad_weights():
    weight = gaussian(33, 130)
    weight[4, 7] = math.inf
    with pytest.raises(ValueError, match="encoder.weight holds inf in row 4, column 7"):
        lk.qlora_init(weight, name="encoder.weight")
    with pytest.raises(ValueError, match="meta device"):
        lk.qlora_init(torch.empty(33, 130, device="meta"))
    with pytest.raises(TypeError, match="torch.int64"):
        lk.qlora_init(torch.zeros(33, 130, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(130,\)"):
        lk.qlora_init(torch.zeros(130))
