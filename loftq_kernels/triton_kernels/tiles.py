"""What the kernels of large tiles share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SWIZZLE: tl.constexpr):
    """(row, column) tile of a program, SWIZZLE columns of tiles at a time: what runs together shares its operands in
    L2."""
    pid = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    band = pid // (SWIZZLE * row_tiles)
    width = min(column_tiles - band * SWIZZLE, SWIZZLE)
    within = pid % (SWIZZLE * row_tiles)
    return within // width, band * SWIZZLE + within % width


@triton.jit
def spread(groups, RUN: tl.constexpr):
    """[R, G] -> [R, G * RUN]: each value RUN times."""
    wide = tl.broadcast_to(groups[:, :, None], (groups.shape[0], groups.shape[1], RUN))
    return wide.reshape(groups.shape[0], groups.shape[1] * RUN)
