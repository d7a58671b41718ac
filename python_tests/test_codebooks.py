"""Tables and the registry of formats."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from helpers import FORMATS

from loftq_kernels.formats import get_format

# As QLoRA's paper and bitsandbytes print them.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


def test_every_format_has_an_oracle():
    assert set(FORMATS) == set(oracle.BITS)


@pytest.mark.parametrize("name", FORMATS)
def test_table(name):
    """The documented formula, by another implementation of the normal quantile."""
    table = get_format(name).codebook()
    assert table.dtype == torch.float32 and table.shape == (2 ** oracle.BITS[name],)
    assert (table.diff() > 0).all()
    np.testing.assert_array_equal(table.numpy(), oracle.codebook(name))
    assert get_format(name).bits == oracle.BITS[name]
    assert get_format(name).scale_rule == oracle.scale_rule(name)
    assert get_format(name).affine == (name in ("int2", "int4", "int8"))


def test_nf4_is_the_table_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    table = get_format("nf4").codebook()
    assert torch.equal(table, torch.tensor([float(level) for level in NF4.split()]))
    assert torch.equal(table, bnb.get_4bit_type("nf4", device="cpu"))


def test_nf2_is_the_table_of_loftq():
    torch.testing.assert_close(
        get_format("nf2").codebook(), torch.tensor([-1.0, 0.0, 0.33791524171829224, 1.0]), rtol=0, atol=0
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_uniform_is_the_table_of_peft(bits):
    assert torch.equal(get_format(f"uniform{bits}").codebook(), torch.linspace(-1, 1, 2**bits))


def test_tables_are_fresh_and_follow_no_defaults():
    get_format("nf4").codebook().zero_()
    assert get_format("nf4").codebook()[0] == -1
    with torch.device("meta"):
        assert get_format("int4").codebook().device.type == "cpu"
    torch.set_default_dtype(torch.float64)
    try:
        assert get_format("uniform4").codebook().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["nf3", "", "NF4", None, 4])
def test_unknown_format(name):
    with pytest.raises(ValueError, match=f"unknown format {name!r}.*nf4"):
        get_format(name)
