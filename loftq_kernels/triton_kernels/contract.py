"""What the kernels need of the storage contract, stated again, so that this folder works without the rest of the
package. `storage.packing` says it in full, and a test compares the two."""

from __future__ import annotations

from torch import Tensor

TILE = 64  # columns of a tile, to which rows of codes are padded
BITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, -1)  # -1: the whole row


def code_bits(entries: int) -> int:
    """Bits per code of a code book with 2^bits entries."""
    return entries.bit_length() - 1


def bits_of(codebook: Tensor) -> int:
    """Bits per code of a code book [2^bits]."""
    return code_bits(codebook.numel())


def row_bytes(in_features: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-in_features // TILE) * TILE * bits // 8


def num_groups(in_features: int, group_size: int) -> int:
    """Groups in one row, the last of which may be partial."""
    return min(in_features, 1) if group_size == -1 else -(-in_features // group_size)
