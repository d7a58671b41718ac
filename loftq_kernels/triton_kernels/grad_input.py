"""grad_x = grad_y @ (codebook[codes] * scale + offset) + h @ lora_A, through the packed weight."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .codes import decode, setup_decode
from .configs import Config, cdiv
from .lora import add_lora, block_r
from .tiles import TileDecoder, scaled, spread, tile_of


@triton.jit
def _load_groups(scale, offset, rows, group):
    """scale and offset (or scale again) [BLOCK_N, runs] of a step's rows."""
    place = rows.to(tl.int64)[:, None] + group[None, :]
    s = tl.load(scale + place).to(tl.float32)
    if offset is None:
        return s, s
    else:
        return s, tl.load(offset + place).to(tl.float32)


# Do not specialize M: setup_decode derives a zero from it, and a constant M = 1 would reveal the tables to ptxas.
@triton.jit(do_not_specialize=["M"])
def _grad_input_kernel(
    grad_y,  # [M, N]
    codes,  # [N, row_bytes] uint8
    scale,  # [N, G]
    offset,  # [N, G] or None
    codebook,
    h,  # [M, R] or None
    lora_A,  # [1, K, R]: the adapter's lora_A, transposed
    grad_x,  # [M, K]
    M,
    N,
    K,
    R,
    num_groups,
    stride_gy,
    stride_codes,
    stride_scale,
    stride_gx,
    stride_ak,
    stride_ar,
    TILE_DECODER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SWIZZLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program computes BLOCK_M rows of TILES 64-wide tiles of grad_x, with one accumulator per field of a byte."""
    pid_m, pid_k = tile_of(tl.program_id(0), M, K, BLOCK_M, 64 * TILES, SWIZZLE)
    dtype: tl.constexpr = grad_y.dtype.element_ty
    DECODER: tl.constexpr = TILE_DECODER.decoder
    BITS: tl.constexpr = DECODER.bits
    setup_decode(M >> 31, DECODER)
    FIELDS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = 8 * BITS  # Bytes of a tile's row, and columns of one of its fields.
    RUN: tl.constexpr = WIDTH if GROUP < 0 or GROUP > WIDTH else GROUP  # Bytes of a field that share a scale.
    SPLIT_FIELDS: tl.constexpr = GROUP == 32 and FIELDS > 1  # The upper half of the fields has its own group.
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    first = pid_k * TILES * WIDTH
    byte = first + tl.arange(0, TILES * WIDTH)
    column = byte // WIDTH * 64 + byte % WIDTH  # Of field 0.
    run = first + tl.arange(0, TILES * WIDTH // RUN) * RUN
    run_column = run // WIDTH * 64 + run % WIDTH
    group = tl.minimum(run_column // GROUP, num_groups - 1) if GROUP > 0 else run_column * 0
    upper = tl.minimum(group + 1, num_groups - 1)

    grad_y_rows = grad_y + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_gy
    acc0 = tl.zeros((BLOCK_M, TILES * WIDTH), dtype=tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        rows = start + n
        rows_in = tl.minimum(rows, N - 1).to(tl.int64)
        g = tl.load(grad_y_rows + rows[None, :], mask=rows[None, :] < N, other=0.0)
        packed = tl.load(codes + rows_in[:, None] * stride_codes + byte[None, :], mask=column[None, :] < K, other=0)
        s, o = _load_groups(scale, offset, rows_in * stride_scale, group)
        s, o = spread(s, RUN), spread(o, RUN)
        fields = decode(packed, codebook, DECODER, TILE_DECODER.field)
        for i in tl.static_range(FIELDS):
            if SPLIT_FIELDS and 2 * i == FIELDS:
                s, o = _load_groups(scale, offset, rows_in * stride_scale, upper)
                s, o = spread(s, RUN), spread(o, RUN)
            w = scaled(fields[i], s, o, offset is not None, TILE_DECODER, dtype)
            if i == 0:
                acc0 = tl.dot(g, w, acc0)
            elif i == 1:
                acc1 = tl.dot(g, w, acc1)
            elif i == 2:
                acc2 = tl.dot(g, w, acc2)
            else:
                acc3 = tl.dot(g, w, acc3)

    grad_x_rows = grad_x + m.to(tl.int64)[:, None] * stride_gx
    for i in tl.static_range(FIELDS):
        acc = acc0 if i == 0 else acc1 if i == 1 else acc2 if i == 2 else acc3
        k = column + i * WIDTH
        if h is not None:
            acc = add_lora(acc, h, lora_A, None, m, k, M, K, R, 1, 0, stride_ak, stride_ar, dtype, BLOCK_R, True)
        tl.store(grad_x_rows + k[None, :], acc.to(dtype), mask=(m[:, None] < M) & (k[None, :] < K))


def launch_grad_input(
    grad_y: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    decoder: TileDecoder,
    h: Tensor | None,
    lora_A: Tensor | None,
    grad_x: Tensor,
    tile: Config,
) -> Tensor:
    """grad_x [M, K] = grad_y [M, N] @ W + h [M, R] @ lora_A [R, K].

    grad_y, h and grad_x are float16 or bfloat16 and have last stride 1. h and lora_A are both given or neither; lora_A
    may have any dtype and strides.
    """
    rows, in_features = grad_x.shape
    rank = 0 if h is None else h.shape[1]
    grid = (cdiv(rows, tile.block_m) * cdiv(in_features, tile.block_n),)
    _grad_input_kernel[grid](
        grad_y,
        codes,
        scale,
        offset,
        codebook,
        h,
        lora_A,
        grad_x,
        rows,
        codes.shape[0],
        in_features,
        rank,
        scale.shape[1],
        grad_y.stride(0),
        codes.stride(0),
        scale.stride(0),
        grad_x.stride(0),
        *((0, 0) if lora_A is None else lora_A.T.stride()),
        TILE_DECODER=decoder,
        GROUP=group_size,
        BLOCK_M=tile.block_m,
        TILES=tile.block_n // 64,
        BLOCK_N=tile.block_k,
        BLOCK_R=block_r(rank),
        SWIZZLE=8,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,  # Product and sum are rounded each, so that weights are those of `dequantize`.
    )
    return grad_x
