"""The adapter's two products for large tiles: down, h = scaling * x @ lora_A[id].T, and up, acc + h @ lora_B[id].T.

Several adapters are stacked along a leading dimension S; each row of x names its own, or none with -1. A tile of rows
visits the adapters between the least and the greatest that its rows name, which are few if rows are sorted by adapter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv


@triton.jit
def adapters_of(ids, row, M, adapters):
    """The adapter of each row (-1 for none or out of range), the least of them and the greatest plus one."""
    if ids is not None:
        own = tl.load(ids + row, mask=row < M, other=-1)
        own = tl.where((own >= 0) & (own < adapters), own, -1).to(tl.int32)
        return own, tl.min(tl.where(own >= 0, own, 2147483647), 0), tl.max(own, 0) + 1
    else:
        return tl.where(row < M, 0, -1), 0, 1


@triton.jit
def _lora_down_kernel(
    x,  # [M, K]
    lora_A,  # [S, R, K]
    ids,  # [M], or None: all rows take adapter 0
    h,  # [splits, M, R]
    M,
    K,
    R,
    adapters,
    scaling,
    columns_per_split,
    stride_x,
    stride_as,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h[split] = scaling * x[:, columns of the split] @ lora_A[ids][:, columns of the split].T"""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    own, first, last = adapters_of(ids, row, M, adapters)
    start = split * columns_per_split
    end = tl.minimum(start + columns_per_split, K)
    x_tile = x + tl.minimum(row, M - 1).to(tl.int64)[:, None] * stride_x + k[None, :]
    a_tile = lora_A + tl.minimum(r, R - 1).to(tl.int64)[None, :] * stride_ar + k.to(tl.int64)[:, None] * stride_ak

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for adapter in range(first, last):
        mine = own == adapter
        if tl.max(mine.to(tl.int32), 0) > 0:
            a_own = a_tile + tl.cast(adapter, tl.int64) * stride_as
            part = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for column in tl.range(start, end, BLOCK_K, num_stages=STAGES):
                inside = column + k < end
                xs = tl.load(x_tile + column, mask=inside[None, :], other=0.0)
                a = tl.load(a_own + tl.cast(column, tl.int64) * stride_ak, mask=inside[:, None], other=0.0)
                part = tl.dot(xs, a.to(xs.dtype), part, input_precision="ieee")
            acc = tl.where(mine[:, None], part, acc)
    place = h + (tl.cast(split, tl.int64) * M + row[:, None]) * R + r[None, :]
    tl.store(place, (acc * scaling).to(h.dtype.element_ty), mask=(row[:, None] < M) & (r[None, :] < R))


@triton.jit
def _lora_reduce_kernel(partial, h, size, splits, BLOCK: tl.constexpr):
    """h [M, R] = partial [splits, M, R] summed over the splits, rounded once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(partial + tl.cast(split, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(h + at, total.to(h.dtype.element_ty), mask=at < size)


@triton.jit
def add_lora(
    acc,  # [BLOCK_N, BLOCK_M] float32, or [BLOCK_M, BLOCK_N] with ROWS_FIRST
    h,  # [M, R] in dtype
    lora_B,  # [S, N, R]
    ids,  # [M] or None
    m,  # rows of h
    n,  # rows of lora_B
    M,
    N,
    R,
    adapters,
    stride_bs,
    stride_bn,
    stride_br,
    dtype: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """acc + h @ lora_B[ids].T. An id that no adapter has makes its row NaN; no memory beyond the adapters is read."""
    if ids is not None:
        named = tl.load(ids + m, mask=m < M, other=-1)
        wrong = tl.where((named >= -1) & (named < adapters), 0.0, float("nan"))
        acc += wrong[:, None] if ROWS_FIRST else wrong[None, :]
    own, first, last = adapters_of(ids, m, M, adapters)
    n_in, m_in = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)
    for adapter in range(first, last):
        mine = own == adapter
        if tl.max(mine.to(tl.int32), 0) > 0:
            b_rows = lora_B + tl.cast(adapter, tl.int64) * stride_bs + n_in * stride_bn
            for start in range(0, R, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                r_in = tl.minimum(r, R - 1).to(tl.int64)
                if ROWS_FIRST:
                    inside = (r[None, :] < R) & mine[:, None]
                    place = m_in[:, None] * R + r_in[None, :]
                    b = tl.load(b_rows[None, :] + r_in[:, None] * stride_br)
                else:
                    inside = (r[:, None] < R) & mine[None, :]
                    place = m_in[None, :] * R + r_in[:, None]
                    b = tl.load(b_rows[:, None] + r_in[None, :] * stride_br)
                part = tl.load(h + place, mask=inside, other=0.0)
                if ROWS_FIRST and ids is not None:
                    # An adapter's Inf times the zeros of other rows would make those NaN.
                    up = tl.dot(part, b.to(dtype), tl.zeros(acc.shape, tl.float32), input_precision="ieee")
                    acc += tl.where(mine[:, None], up, 0.0)
                elif ROWS_FIRST:
                    acc = tl.dot(part, b.to(dtype), acc, input_precision="ieee")
                else:
                    # A tile of prefill has no registers left for a product of its own: other rows may become NaN here.
                    acc = tl.dot(b.to(dtype), part, acc, input_precision="ieee")
    return acc


@triton.jit
def _lora_up_kernel(
    y,  # [M, N], changed in place
    h,  # [M, R] in the dtype of y
    lora_B,  # [S, N, R]
    ids,  # [M] or None
    M,
    N,
    R,
    adapters,
    stride_y,
    stride_bs,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y += h @ lora_B[ids].T"""
    column_tiles = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    place = y + m.to(tl.int64)[:, None] * stride_y + n[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    acc = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = y.dtype.element_ty
    acc = add_lora(
        acc, h, lora_B, ids, m, n, M, N, R, adapters, stride_bs, stride_bn, stride_br, dtype, BLOCK_R, ROWS_FIRST=True
    )
    tl.store(place, acc.to(dtype), mask=mask)


def block_r(rank: int) -> int:
    """Ranks that a product takes at a time: at least the 16 of tensor cores, and 32 for ranks that fill more."""
    return 16 if rank <= 16 else 32


def launch_lora_down(
    x: Tensor, lora_A: Tensor, adapter_ids: Tensor | None, scaling: float, multiprocessors: int
) -> Tensor:
    """h [M, R] = scaling * x @ lora_A[adapter_ids].T in the dtype of x, summed in float32.

    x [M, K] has last stride 1, lora_A [S, R, K] any strides and dtype. Rows whose id in adapter_ids [M] is -1 or out of
    range become zeros.
    """
    rows, columns = x.shape
    rank = lora_A.shape[1]
    block_m = 16 if rows <= 16 else 64
    block_rank = 16 if rank <= 16 else 32 if rank <= 32 else 64
    grid = cdiv(rows, block_m), cdiv(rank, block_rank)
    # A few rows fill the device only if their columns are split.
    splits = max(1, min(32, multiprocessors // (grid[0] * grid[1]), cdiv(columns, 256)))
    columns_per_split = cdiv(cdiv(columns, splits), 64) * 64
    splits = cdiv(columns, columns_per_split)
    h = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
    partial = h if splits == 1 else torch.empty(splits, rows, rank, dtype=torch.float32, device=x.device)
    _lora_down_kernel[(grid[0], splits, grid[1])](
        x,
        lora_A,
        adapter_ids,
        partial,
        rows,
        columns,
        rank,
        lora_A.shape[0],
        scaling,
        columns_per_split,
        x.stride(0),
        *lora_A.stride(),
        BLOCK_M=block_m,
        BLOCK_R=block_rank,
        BLOCK_K=64,
        STAGES=3,
        num_warps=4,
    )
    if splits > 1:
        _lora_reduce_kernel[(cdiv(h.numel(), 256),)](partial, h, h.numel(), splits, BLOCK=256, num_warps=2)
    return h


def launch_lora_up(y: Tensor, h: Tensor, lora_B: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """y [M, N] += h [M, R] @ lora_B[adapter_ids].T, in place. lora_B [S, N, R] may have any strides and dtype."""
    rows, columns = y.shape
    rank = h.shape[1]
    block_m = 16 if rows <= 16 else 64
    _lora_up_kernel[(cdiv(columns, 128) * cdiv(rows, block_m),)](
        y,
        h,
        lora_B,
        adapter_ids,
        rows,
        columns,
        rank,
        lora_B.shape[0],
        y.stride(0),
        *lora_B.stride(),
        BLOCK_M=block_m,
        BLOCK_N=128,
        BLOCK_R=block_r(rank),
        num_warps=4,
    )
    return y
