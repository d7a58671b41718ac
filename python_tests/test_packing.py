"""The storage contract: where every code lies."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from properties import given, st

from loftq_kernels.ops import extension
from loftq_kernels.storage import packing

BITS = packing.BITS


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)


@pytest.mark.parametrize("op", ["python", "dispatched"])
@pytest.mark.parametrize("bits", BITS)
def test_each_column_has_its_own_place(bits, op):
    """A single code set in a row of zeros changes exactly the bits that the contract names."""
    pack = packing.pack_codes if op == "python" else torch.ops.loftq_kernels.pack_codes
    fields, bytes_per_tile = 8 // bits, 64 * bits // 8
    codes = torch.zeros(130, 130, dtype=torch.uint8)
    codes.fill_diagonal_(2**bits - 1)
    packed = pack(codes, bits)
    expected = torch.zeros(130, 3 * bytes_per_tile, dtype=torch.uint8)
    for tile in range(3):
        for byte in range(bytes_per_tile):
            for field in range(fields):
                column = 64 * tile + byte + field * (64 // fields)
                if column < 130:
                    expected[column, tile * bytes_per_tile + byte] = (2**bits - 1) << (field * bits)
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("bits", BITS)
def test_four_bit_tile_by_hand(bits):
    """The first bytes of a tile, spelled out: halves of the tile at 4 bits, quarters at 2 bits."""
    codes = (torch.arange(64) % 2**bits).to(torch.uint8)[None]
    first = {8: 0, 4: 0 | (32 % 16) << 4, 2: 0 | (16 % 4) << 2 | (32 % 4) << 4 | (48 % 4) << 6}[bits]
    fourth = {8: 3, 4: 3 | (35 % 16) << 4, 2: 3 | (19 % 4) << 2 | (35 % 4) << 4 | (51 % 4) << 6}[bits]
    packed = packing.pack_codes(codes, bits)
    assert packed[0, 0] == first and packed[0, 3] == fourth


@given(rows=st.integers(0, 5), columns=st.integers(0, 200), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_round_trip(rows, columns, bits, seed):
    torch.manual_seed(seed)
    codes = random_codes(rows, columns, bits)
    for pack, unpack in (
        (packing.pack_codes, packing.unpack_codes),
        (torch.ops.loftq_kernels.pack_codes, torch.ops.loftq_kernels.unpack_codes),
    ):
        packed = pack(codes, bits)
        assert packed.shape == (rows, packing.row_bytes(columns, bits)) and packed.is_contiguous()
        assert torch.equal(unpack(packed, bits, columns), codes)
    assert np.array_equal(oracle.decode_codes(packed, columns, bits), codes.numpy())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 31, 65, 127])
def test_fields_beyond_the_row_are_zero(bits, columns):
    packed = torch.ops.loftq_kernels.pack_codes(random_codes(3, columns, bits), bits)
    padded = packing.padded_in_features(columns)
    assert not packing.unpack_codes(packed, bits, padded)[:, columns:].any()


@pytest.mark.parametrize("bits", BITS)
def test_pack_takes_any_strides(bits):
    codes = random_codes(70, 6, bits).T
    packed = torch.ops.loftq_kernels.pack_codes(codes, bits)
    assert torch.equal(packed, packing.pack_codes(codes.contiguous(), bits))


def test_sizes():
    assert [packing.padded_in_features(k) for k in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert [packing.row_bytes(65, b) for b in BITS] == [32, 64, 128]
    assert [packing.num_groups(k, 64) for k in (0, 1, 64, 65)] == [0, 1, 1, 2]
    assert [packing.num_groups(k, -1) for k in (0, 1, 1000)] == [0, 1, 1]


@pytest.mark.parametrize("group_size", [48, 0, -2, 512, True, "64", None])
def test_bad_group_size(group_size):
    with pytest.raises(ValueError, match=f"group_size={group_size!r}"):
        packing.check_group_size(group_size)


@pytest.mark.parametrize("bits", [0, 1, 3, 16])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        packing.check_bits(bits)


@pytest.mark.skipif(extension.library is None, reason="the extension is not built")
def test_python_and_cpp_state_the_same_contract():
    assert extension.library.GROUP_SIZES == packing.GROUP_SIZES
    assert extension.library.CODE_BITS == packing.BITS
