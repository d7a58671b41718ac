"""out = codebook[codes] * scale + offset, dense, at the speed of memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv
from .contract import bits_of
from .tiles import spread


@triton.jit
def _dequantize_kernel(
    codes,  # [N, row_bytes] uint8
    scale,  # [N, G]
    offset,  # [N, G] or None
    codebook,  # [2^BITS] float32
    out,  # [N, K]
    N,
    K,
    num_groups,
    stride_codes,
    stride_scale,
    stride_out,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program decodes BLOCK_N rows of TILES 64-wide tiles.

    The code book is read from L1: while an H200 reads codes and writes bfloat16 at 4.3 TB/s it can issue 17
    instructions per weight, and a look-up takes 10.
    """
    FIELDS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = 8 * BITS  # Bytes of a tile's row, and columns of one of its fields.
    RUN: tl.constexpr = WIDTH if GROUP < 0 or GROUP > WIDTH else GROUP  # Bytes of a field that share a scale.
    # All programs are in the grid's first dimension: the others end at 65535, which would be half a million rows.
    columns_of_programs = tl.cdiv(K, TILES * 64)
    n = tl.program_id(0) // columns_of_programs * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = tl.minimum(n, N - 1).to(tl.int64)
    first = tl.program_id(0) % columns_of_programs * TILES * WIDTH
    byte = first + tl.arange(0, TILES * WIDTH)
    column = byte // WIDTH * 64 + byte % WIDTH  # Of field 0.
    run = first + tl.arange(0, TILES * WIDTH // RUN) * RUN
    run_column = run // WIDTH * 64 + run % WIDTH
    code_mask = (n[:, None] < N) & (column[None, :] < K)
    packed = tl.load(codes + n_in[:, None] * stride_codes + byte[None, :], mask=code_mask, other=0).to(tl.int32)
    out_rows = out + n_in[:, None] * stride_out
    for i in tl.static_range(FIELDS):
        # Groups of 64 and more are the same for all fields of a byte, so that the loads below become one.
        group = (run_column + (i * WIDTH if GROUP < 64 else 0)) // GROUP if GROUP > 0 else run_column * 0
        place = n_in[:, None] * stride_scale + tl.minimum(group, num_groups - 1)[None, :]
        value = tl.load(codebook + ((packed >> (i * BITS)) & (2**BITS - 1)))
        value = value * spread(tl.load(scale + place).to(tl.float32), RUN)
        if offset is not None:
            value = value + spread(tl.load(offset + place).to(tl.float32), RUN)
        target = column + i * WIDTH
        tl.store(
            out_rows + target[None, :], value.to(out.dtype.element_ty), mask=(n[:, None] < N) & (target[None, :] < K)
        )


def launch_dequantize(
    codes: Tensor, scale: Tensor, offset: Tensor | None, codebook: Tensor, group_size: int, out: Tensor
) -> Tensor:
    """Fill out [N, K] (float32, float16 or bfloat16, last stride 1) with codebook[codes] * scale + offset.

    Product and sum are computed in float32, which rounds each, and rounded once to out's dtype: these are the
    reference's bits. codes, scale and offset may be slices of rows, or of columns that start a tile and a group.
    """
    rows, columns = out.shape
    bits = bits_of(codebook)
    if out.numel() == 0:
        return out
    tiles = {2: 16, 4: 8, 8: 4}[bits]  # 256 bytes per row.
    block_n = 8
    grid = (cdiv(columns, 64 * tiles) * cdiv(rows, block_n),)
    _dequantize_kernel[grid](
        codes,
        scale,
        offset,
        codebook,
        out,
        rows,
        columns,
        scale.shape[1],
        codes.stride(0),
        scale.stride(0),
        out.stride(0),
        BITS=bits,
        GROUP=group_size,
        BLOCK_N=block_n,
        TILES=tiles,
        num_warps=4,
        enable_fp_fusion=False,  # A fused multiply-add would skip one of the reference's roundings.
    )
    return out
