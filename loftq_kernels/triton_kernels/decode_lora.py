"""The adapters within the decode launch: its first programs compute x A^T for those that make tiles of y.

Each block of rows has counters: [0] blocks of ranks whose sums are there, [1] tiles that have seen all of them, [2]
tickets drawn, [3...] parts that are done, one counter per block of ranks. The last program to count sets each back to
zero. Each block of rows has memory in float32: the parts [chunks, R, BLOCK_M], and behind them their sums [R, BLOCK_M].

Adapters are read in their own dtype and rounded to that of x after the load.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .configs import cdiv
from .lora import block_r

CHUNK = 256  # Columns of x that one program multiplies by lora_A.


def down_plan(rank: int, columns: int, rows: int, block_m: int, *, by_row: bool) -> tuple[int, int, int]:
    """(programs, counters, float32 elements of memory) that a block of rows takes.

    by_row: rows have adapters of their own. Then there are programs for each row, and those of an adapter's first row
    compute for all its rows, while those of the others stay idle.
    """
    if rank == 0:
        return 0, 3, 0
    chunks, rank_blocks = cdiv(columns, CHUNK), cdiv(rank, block_r(rank))
    adapters = min(rows, block_m) if by_row else 1
    return chunks * rank_blocks * adapters, 3 + rank_blocks, (chunks + 1) * rank * block_m


@triton.jit
def counters_of(counters, R, row_block, BLOCK_R: tl.constexpr):
    """The counters of a block of rows. Those of the block behind the last are what follows all of them."""
    return counters + row_block * (3 + tl.cdiv(R, BLOCK_R))


@triton.jit
def draw_ticket(counters, R, row_block, BLOCK_R: tl.constexpr):
    """The place of this program among those of its block of rows, in the order of their start."""
    ticket = counters_of(counters, R, row_block, BLOCK_R) + 2
    drawn = tl.atomic_add(ticket, 1, sem="relaxed")
    if drawn == tl.num_programs(0) - 1:
        tl.store(ticket, 0)  # This is the last program: nobody draws any more.
    return drawn


@triton.jit
def _memory_of(workspace, row_block, K, R, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    return workspace + (row_block * (tl.cdiv(K, CHUNK) + 1)).to(tl.int64) * R * BLOCK_M


@triton.jit
def _first_of(ids, index, S, BLOCK_M: tl.constexpr):
    """(the id of row `index`, the rows that have it, whether an adapter has this id and this row is its first)."""
    m = tl.arange(0, BLOCK_M)
    adapter = tl.sum(tl.where(m == index, ids, 0), 0)
    is_first = (adapter >= 0) & (adapter < S) & (tl.min(tl.where(ids == adapter, m, BLOCK_M), 0) == index)
    return adapter, ids == adapter, is_first


@triton.jit
def lora_down(
    x, lora_A, adapter_ids, workspace, counters, M, K, R, S, scaling, num_downs, index, row_block,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A part of scaling * (x @ lora_A[id].T).T: a chunk of columns by a block of ranks of one adapter. The program that
    does the last part of a block of ranks adds all of them up and counts the block as done."""
    chunks, rank_blocks = tl.cdiv(K, CHUNK), tl.cdiv(R, BLOCK_R)
    chunk, rank_block = index % chunks, index // chunks % rank_blocks
    m = tl.arange(0, BLOCK_M)
    row = row_block * BLOCK_M + m
    used = row < M
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, K)
    if adapter_ids is not None:
        ids = tl.load(adapter_ids + row, mask=used, other=-1).to(tl.int64)
        adapter, used, is_first = _first_of(ids, index // (chunks * rank_blocks), S, BLOCK_M)
        lora_A += tl.where(is_first, adapter, 0) * R * K
        used &= is_first
        last = tl.where(is_first, last, first)
    memory = _memory_of(workspace, row_block, K, R, BLOCK_M, CHUNK)
    r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    down = _down_product(x, lora_A, row, used, r, first, last, K, R, BLOCK_M, BLOCK_R)
    at = memory + chunk.to(tl.int64) * R * BLOCK_M + r[:, None] * BLOCK_M + m[None, :]
    tl.store(at, down, mask=(r < R)[:, None] & used[None, :], cache_modifier=".cg")
    own = counters_of(counters, R, row_block, BLOCK_R)
    tl.debug_barrier()  # All threads' parts are written before one of them counts.
    if tl.atomic_add(own + 3 + rank_block, 1, sem="acq_rel") == num_downs // rank_blocks - 1:
        tl.debug_barrier()
        tl.store(own + 3 + rank_block, 0)
        _add_chunks(memory, rank_block, chunks, R, scaling, BLOCK_M, BLOCK_R)
        tl.debug_barrier()
        tl.atomic_add(own, 1, sem="release")


@triton.jit
def _down_product(x, lora_A, row, used, r, first, last, K, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """lora_A @ x.T over columns first..last, for the rows of x that are used, with lora_A in the dtype of x."""
    PRECISION: tl.constexpr = "ieee" if x.dtype.element_ty == tl.float32 else "tf32"
    x_row = x + row.to(tl.int64)[None, :] * K
    a_row = lora_A + r.to(tl.int64)[:, None] * K
    down = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for k0 in range(first, last, 64):
        k = k0 + tl.arange(0, 64)
        a = tl.load(a_row + k[None, :], mask=(r < R)[:, None] & (k < last)[None, :], other=0.0)
        xs = tl.load(x_row + k[:, None], mask=used[None, :] & (k < last)[:, None], other=0.0)
        down = tl.dot(a.to(xs.dtype), xs, down, input_precision=PRECISION)
    return down


@triton.jit
def _add_chunks(memory, rank_block, chunks, R, scaling, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Sums of a block of ranks. They are scaled before they are rounded: factors may be large and scaling small. Rows
    without an adapter have no parts: what is added up for them is never read."""
    size = R * BLOCK_M
    e = rank_block * (BLOCK_R * BLOCK_M) + tl.arange(0, BLOCK_R * BLOCK_M)
    total = tl.zeros((BLOCK_R * BLOCK_M,), tl.float32)
    for c0 in range(0, chunks, 16):
        c = c0 + tl.arange(0, 16)
        mask = (c < chunks)[:, None] & (e < size)[None, :]
        parts = tl.load(memory + c[:, None] * size + e[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        total += tl.sum(parts, axis=0)
    tl.store(memory + chunks * size + e, scaling * total, mask=e < size, cache_modifier=".cg")


@triton.jit
def lora_up(
    acc, x, lora_B, adapter_ids, workspace, counters, M, N, K, R, S, n, row_block,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """acc + scaling * lora_B[id] @ (x @ lora_A[id].T).T, after waiting for the sums of the latter."""
    rank_blocks = tl.cdiv(R, BLOCK_R)
    own = counters_of(counters, R, row_block, BLOCK_R)
    while tl.atomic_add(own, 0, sem="acquire") < rank_blocks:
        pass
    if tl.atomic_add(own + 1, 1, sem="acq_rel") == tl.cdiv(N, BLOCK_N) - 1:
        tl.store(own, 0)  # All tiles have seen it.
        tl.store(own + 1, 0)
    tl.debug_barrier()
    down_at = _memory_of(workspace, row_block, K, R, BLOCK_M, CHUNK) + tl.cdiv(K, CHUNK).to(tl.int64) * R * BLOCK_M
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    if adapter_ids is None:
        for r0 in range(0, R, BLOCK_R):
            acc = _up_product(acc, x, down_at, lora_B, row < M, n, r0, N, R, BLOCK_M, BLOCK_R)
    else:
        ids = tl.load(adapter_ids + row, mask=row < M, other=-1).to(tl.int64)
        # There is no branch, so that the loads of one adapter run while another is multiplied.
        for i in range(0, tl.minimum(BLOCK_M, M - row_block * BLOCK_M) * rank_blocks):
            adapter, used, is_first = _first_of(ids, i // rank_blocks, S, BLOCK_M)
            own_B = lora_B + tl.where(is_first, adapter, 0) * N * R
            rows = tl.where(is_first, N, 0)
            r0 = i % rank_blocks * BLOCK_R
            zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            up = _up_product(zeros, x, down_at, own_B, used & is_first, n, r0, rows, R, BLOCK_M, BLOCK_R)
            # An adapter's Inf times the zeros of other rows would make those NaN.
            acc += tl.where(used[None, :], up, 0.0)
        # An id that no adapter has makes its row NaN; no memory beyond the adapters is read.
        acc += tl.where((ids >= -1) & (ids < S), 0.0, float("nan"))[None, :]
    return acc


@triton.jit
def _up_product(acc, x, down_at, lora_B, used, n, r0, N, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """acc + lora_B[n, r0...] @ down, for rows n below N and the rows of x that are used, both in the dtype of x."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if tl.float32 == DTYPE else "tf32"
    m = tl.arange(0, BLOCK_M)
    r = r0 + tl.arange(0, BLOCK_R)
    b_at = lora_B + n[:, None].to(tl.int64) * R + r[None, :]
    b = tl.load(b_at, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
    mask = (r < R)[:, None] & used[None, :]
    down = tl.load(down_at + r[:, None] * BLOCK_M + m[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    return tl.dot(b.to(DTYPE), down.to(DTYPE), acc, input_precision=PRECISION)
