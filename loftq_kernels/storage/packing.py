"""The storage contract: how b-bit codes lie in bytes.

K is padded to a multiple of 64. With P = 8 / b codes to a byte, byte j of the 64-wide tile t holds the codes of columns
``64 t + j + i * (64 / P)`` for i = 0..P-1, field i at bits ``[i b, (i + 1) b)``. One shift and mask of a vector of
bytes therefore yields a contiguous slice of K: no lane ever has to be moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq_kernels.vocabulary import GROUP_SIZES

TILE = 64
BITS = (2, 4, 8)


def padded_in_features(in_features: int) -> int:
    """K rounded up to a multiple of 64."""
    return -(-in_features // TILE) * TILE


def row_bytes(in_features: int, bits: int) -> int:
    """Bytes of one packed row: K_pad * bits / 8."""
    return padded_in_features(in_features) * bits // 8


def group_width(in_features: int, group_size: int) -> int:
    """Columns of one group: ``group_size=-1`` stands for the whole row."""
    return in_features if group_size == -1 else group_size


def num_groups(in_features: int, group_size: int) -> int:
    """Groups in one row, the last of which may be partial; ``group_size=-1`` makes one group of the row."""
    if group_size == -1:
        return min(in_features, 1)
    return -(-in_features // group_size)


def spread_groups(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """One value per group [N, G] -> one per column [N, in_features]."""
    return values.repeat_interleave(group_width(in_features, group_size), dim=1)[:, :in_features]


def check_group_size(group_size: int) -> int:
    """group_size as an int. Raises ValueError, with the value, unless it is one of `GROUP_SIZES`."""
    number = None if isinstance(group_size, bool) or not hasattr(group_size, "__index__") else int(group_size)
    if number not in GROUP_SIZES:
        raise ValueError(f"group_size={group_size!r} is not one of {GROUP_SIZES} (-1: the whole row)")
    return number


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits!r} is not one of {BITS}")


def bits_of(codebook: Tensor) -> int:
    """Bits per code of a code book [2^bits]."""
    return code_bits(codebook.numel())


def code_bits(entries: int) -> int:
    """Bits per code of a code book with 2^bits entries."""
    return entries.bit_length() - 1


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device).view(-1, 1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [N, K] uint8, each below 2^bits, into bytes [N, K_pad * bits / 8]; padding becomes code 0."""
    rows, columns = codes.shape
    padded = codes.new_zeros(rows, padded_in_features(columns))
    padded[:, :columns] = codes
    fields = padded.view(rows, padded.shape[1] // TILE, 8 // bits, TILE * bits // 8)  # [N, tile, field, byte]
    # The fields of a byte do not overlap, so their sum is their bitwise or.
    packed = (fields << _shifts(bits, codes.device)).sum(dim=2, dtype=torch.uint8)
    return packed.view(rows, row_bytes(columns, bits))


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack_codes`: bytes [N, K_pad * bits / 8] to codes [N, in_features] uint8."""
    rows = packed.shape[0]
    tiles = packed.view(rows, packed.shape[1] * 8 // (TILE * bits), 1, TILE * bits // 8)
    fields = (tiles >> _shifts(bits, packed.device)) & (2**bits - 1)
    return fields.reshape(rows, packed.shape[1] * 8 // bits)[:, :in_features].contiguous()
