"""The kernel of decode: a few rows of x by a packed weight, with the adapters in the same launch. `decode_launch`
launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import constant_like, decode, setup_decode
from .decode_lora import counters_of, draw_ticket, lora_down, lora_up
from .tiles import add_parts

# Columns of x and of the weight that are multiplied at a time. With 16 a thread's four bytes are four consecutive
# columns of one instruction, and x leaves shared memory in the instruction's order of registers. With 32 columns each
# instruction would need two moves.
SLICE: tl.constexpr = tl.constexpr(16)


# Do not specialize M: setup_decode derives a zero from it, and a constant M = 1 would reveal the tables to ptxas.
@triton.jit(do_not_specialize=["M", "row_units", "num_downs", "split_tiles", "S"])
def decode_linear_kernel(
    x,  # [M, K]
    codes,  # [N, row_bytes] uint8
    scale,  # [N, G]
    offset,  # [N, G], or None
    codebook,  # [2^BITS] float32
    lora_A,  # [S, R, K] of any dtype, or None
    lora_B,  # [S, N, R] of any dtype
    adapter_ids,  # [M] int32 or int64; None: all 0
    bias,  # [N], or None
    y,  # [M, N]
    workspace,  # float32: parts of splits, then the memory of `decode_lora`
    counters,  # int32, zeros before and after: those of `decode_lora`, then one per tile of y
    M,
    N,
    K,
    row_units,  # bytes of a row of codes, in units of 8
    G,
    R,
    S,
    scaling,
    num_downs,  # programs per block of rows that compute x A^T
    split_tiles,  # tiles of 64 columns that one program multiplies
    DECODER: tl.constexpr,  # a `codebooks.Decoder`
    GROUP: tl.constexpr,  # columns of a group; 0: the row
    EVEN: tl.constexpr,  # whether K is a multiple of 64 * TILES
    WIDE: tl.constexpr,  # scales that are loaded at a time: 4 or 2 if they have 16 bits and are aligned, else 1
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,  # columns of x A^T that one program computes
):
    """y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A[id].T) @ lora_B[id].T + bias

    The weight is the left operand and the rows of x are the columns of the right one, so that M = 1 wastes 7 columns of
    an instruction rather than 15 rows. Sums over a group are scaled in float32. The first programs compute a part of
    x A^T each; the others multiply by the weight first and then wait for the sums of x A^T. The last of the programs
    that share a tile of y adds up their parts.

    Devices have been seen to start programs in the order of their index, but CUDA does not promise it. If there are
    more programs than fit on the device at once, waiting for one that has not started may never end. So with adapters a
    program's work is chosen by a ticket that it draws at its start, not by its index: a program that waits has drawn
    later than those it waits for, which run and wait for nobody. This costs the latency of one atomic.
    """
    pid = tl.program_id(0)
    row_block = tl.program_id(1)
    if lora_A is None:
        _one_tile(
            x, codes, scale, offset, codebook, lora_A, lora_B, adapter_ids, bias, y, workspace, counters,
            M, N, K, row_units, G, R, S, split_tiles, pid, row_block,
            DECODER, GROUP, EVEN, WIDE, SPLITS, BLOCK_M, BLOCK_N, TILES, BLOCK_R, CHUNK,
        )  # fmt: skip
    else:
        pid = draw_ticket(counters, R, row_block, BLOCK_R)
        if pid < num_downs:
            lora_down(
                x, lora_A, adapter_ids, _lora_memory(workspace, N, SPLITS, BLOCK_M, BLOCK_N), counters,
                M, K, R, S, scaling, num_downs, pid, row_block, BLOCK_M, BLOCK_R, CHUNK,
            )  # fmt: skip
        else:
            _one_tile(
                x, codes, scale, offset, codebook, lora_A, lora_B, adapter_ids, bias, y, workspace, counters,
                M, N, K, row_units, G, R, S, split_tiles, pid - num_downs, row_block,
                DECODER, GROUP, EVEN, WIDE, SPLITS, BLOCK_M, BLOCK_N, TILES, BLOCK_R, CHUNK,
            )  # fmt: skip


@triton.jit
def _lora_memory(workspace, N, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The memory of `decode_lora`, which lies behind the parts of splits."""
    if SPLITS > 1:
        workspace += tl.num_programs(1) * tl.cdiv(N, BLOCK_N).to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M)
    return workspace


@triton.jit
def _one_tile(
    x, codes, scale, offset, codebook, lora_A, lora_B, adapter_ids, bias, y, workspace, counters,
    M, N, K, row_units, G, R, S, split_tiles, index, row_block,
    DECODER: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One split of one tile [BLOCK_M, BLOCK_N] of y; the last split to be done finishes the tile."""
    tile = index // SPLITS
    split = index % SPLITS
    acc = _multiply(
        x, codes, scale, offset, codebook, M, N, K, row_units, G, split_tiles, tile, split, row_block,
        DECODER, GROUP, EVEN, WIDE, BLOCK_M, BLOCK_N, TILES,
    )  # fmt: skip
    if DECODER.unit != 1.0:
        acc *= DECODER.unit
    if SPLITS == 1:
        _finish(
            acc, x, lora_A, lora_B, adapter_ids, bias, y, workspace, counters, M, N, K, R, S, tile, row_block,
            SPLITS, BLOCK_M, BLOCK_N, BLOCK_R, CHUNK,
        )  # fmt: skip
    else:
        at = row_block * tl.cdiv(N, BLOCK_N) + tile
        parts = workspace + at.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M)
        used = M - row_block * BLOCK_M
        counter = counters_of(counters, R, tl.num_programs(1), BLOCK_R) + at
        is_last, total = add_parts(acc, used, parts, counter, split, SPLITS)
        if is_last:
            _finish(
                total, x, lora_A, lora_B, adapter_ids, bias, y, workspace, counters, M, N, K, R, S, tile, row_block,
                SPLITS, BLOCK_M, BLOCK_N, BLOCK_R, CHUNK,
            )  # fmt: skip


@triton.jit
def _multiply(
    x, codes, scale, offset, codebook, M, N, K, row_units, G, split_tiles, tile, split, row_block,
    DECODER: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """(codebook[codes] * scale + offset) @ x.T / unit over one split of K: float32 [BLOCK_N, BLOCK_M]."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    PLANES: tl.constexpr = DECODER.planes
    CONSTANTS: tl.constexpr = DECODER.constants
    UNIT: tl.constexpr = DECODER.unit
    CENTER: tl.constexpr = DECODER.center
    LOADS: tl.constexpr = DECODER.bits // 2  # Slices of bytes per tile.
    CORRECT: tl.constexpr = len(CONSTANTS) > 0
    SUMS: tl.constexpr = CENTER != 0.0 or offset is not None
    HALVES: tl.constexpr = GROUP == 32  # There are two groups per tile.
    # Tiles that are summed before they are scaled. Large constants have to cancel before much is added to them.
    SPAN: tl.constexpr = (1 if CORRECT else TILES) if GROUP == 0 else (1 if HALVES else GROUP // 64)
    GROUPS: tl.constexpr = (2 if HALVES else 1) * (TILES // SPAN)  # Per iteration.
    # Triton must not know that rows of 16 bytes are aligned to 16: it would give each thread a whole row of bytes and
    # decode ahead of shared memory, which takes three times the instructions.
    row_bytes = row_units * 8

    setup_decode(M >> 31, DECODER)
    n = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    m = tl.minimum(row_block * BLOCK_M + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    k = tl.arange(0, SLICE)
    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(K, 64))
    codes_at = codes + (n * row_bytes)[:, None] + (first * (LOADS * SLICE) + k)[None, :]
    x_at = x + (m * K)[None, :] + (first * 64 + k)[:, None]
    group = first * 64 // GROUP if GROUP else 0
    scale_at = scale + n * G
    offset_at = offset + n * G if offset is not None else scale_at
    scales = _load_groups(scale_at, group, G, GROUPS, WIDE)
    offsets = _load_groups(offset_at, group, G, GROUPS, WIDE) if offset is not None else scales

    # Constants are formally computed from some bytes of the codes: see `constant_like`. The bytes are the same in all
    # instructions' operands, so that rows share the products with constants, but differ between an operand's four
    # registers and between the two halves of an instruction's 16 rows, so that ptxas keeps four registers.
    some = (tl.arange(0, BLOCK_N)[:, None] // 8 % 2 * 4 + k[None, :]) % SLICE
    constants = _constants(tl.load(codes + some), DECODER, DTYPE)
    zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = zeros
    total = zeros
    for t in range(first, last, TILES):
        packed = _load_codes(codes_at, row_bytes - t * (LOADS * SLICE), k, TILES * LOADS, EVEN)
        next_scales = scales
        next_offsets = offsets
        if GROUP:  # Scales are loaded a whole iteration ahead of their use.
            group += GROUPS
            next_scales = _load_groups(scale_at, group, G, GROUPS, WIDE)
            if offset is not None:
                next_offsets = _load_groups(offset_at, group, G, GROUPS, WIDE)
        for b in tl.static_range(TILES // SPAN):
            xs = _load_x(x_at + b * (SPAN * 64), K - (t + b * SPAN) * 64, k, 4 * SPAN, EVEN)
            part = zeros
            if GROUP:
                total = zeros
            # Constants come first, because all rows of the weight share their products.
            if SUMS:
                total = _sum(constants[len(CONSTANTS)], xs, 0, 2 if HALVES else 4 * SPAN, total)
            if CORRECT:
                part = _correct(constants, xs, 0, 2 if HALVES else 4 * SPAN, LOADS, PLANES, part)
            for u in tl.static_range(SPAN):
                fields = _decode_tile(packed, (b * SPAN + u) * LOADS, codebook, DECODER, DTYPE)
                for s in tl.static_range(4):
                    if HALVES and s == 2:
                        acc = _add_group(
                            acc, part, total, scales[2 * b], offsets[2 * b], offset is not None, UNIT, CENTER
                        )
                        part = zeros
                        if SUMS:
                            total = _sum(constants[len(CONSTANTS)], xs, 2, 4, zeros)
                        if CORRECT:
                            part = _correct(constants, xs, 2, 4, LOADS, PLANES, part)
                    for p in tl.static_range(PLANES):
                        part = _dot(fields[s * PLANES + p], xs[4 * u + s], part)
            if GROUP:
                acc = _add_group(
                    acc, part, total, scales[GROUPS * SPAN // TILES * (b + 1) - 1],
                    offsets[GROUPS * SPAN // TILES * (b + 1) - 1], offset is not None, UNIT, CENTER,
                )  # fmt: skip
            else:
                acc += part  # The constants' large terms have cancelled in part.
        scales = next_scales
        offsets = next_offsets
        codes_at += TILES * LOADS * SLICE
        x_at += TILES * 64
    if not GROUP:
        acc = _add_group(zeros, acc, total, scales[0], offsets[0], offset is not None, UNIT, CENTER)
    return acc


@triton.jit
def _dot(weight, xs, acc):
    PRECISION: tl.constexpr = "ieee" if xs.dtype == tl.float32 else "tf32"
    return tl.dot(weight, xs, acc, input_precision=PRECISION)


@triton.jit
def _sum(ones, xs, FIRST: tl.constexpr, LAST: tl.constexpr, acc):
    """acc + the sums of the slices FIRST..LAST of x, the same in every row of the weight."""
    for i in tl.static_range(FIRST, LAST):
        acc = _dot(ones, xs[i], acc)
    return acc


@triton.jit
def _correct(constants, xs, FIRST: tl.constexpr, LAST: tl.constexpr, LOADS: tl.constexpr, PLANES: tl.constexpr, acc):
    """acc + the products of a decoder's constants with the slices FIRST..LAST of x."""
    for i in tl.static_range(FIRST, LAST):
        for p in tl.static_range(PLANES):
            acc = _dot(constants[i % 4 // LOADS * PLANES + p], xs[i], acc)
    return acc


@triton.jit
def _constants(packed, DECODER: tl.constexpr, DTYPE: tl.constexpr):
    """The matrices that correct the fields, and one of ones: [BLOCK_N, SLICE] each."""
    values = ()
    for i in tl.static_range(len(DECODER.constants)):
        values = values + (constant_like(packed, DECODER, i, DECODER.constants[i], DTYPE),)
    return values + (constant_like(packed, DECODER, -1, 1.0, DTYPE),)


@triton.jit
def _load_x(at, left, k, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """COUNT slices [SLICE, BLOCK_M] of the columns of x from `at` on, of which `left` exist; the others are zeros."""
    xs = ()
    for i in tl.static_range(COUNT):
        if EVEN:
            xs = xs + (tl.load(at + i * SLICE),)
        else:
            xs = xs + (tl.load(at + i * SLICE, mask=(k < left - i * SLICE)[:, None], other=0.0),)
    return xs


@triton.jit
def _load_codes(at, left, k, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """COUNT slices [BLOCK_N, SLICE] of the bytes from `at` on, of which `left` exist; the others are zeros."""
    packed = ()
    for i in tl.static_range(COUNT):
        if EVEN:
            packed = packed + (tl.load(at + i * SLICE),)
        else:
            packed = packed + (tl.load(at + i * SLICE, mask=(k < left - i * SLICE)[None, :], other=0),)
    return packed


@triton.jit
def _decode_tile(packed, FIRST: tl.constexpr, codebook, DECODER: tl.constexpr, DTYPE: tl.constexpr):
    """The tile of 64 columns in packed[FIRST] and following: 4 * planes fields [BLOCK_N, SLICE], by columns."""
    PLANES: tl.constexpr = DECODER.planes
    LOADS: tl.constexpr = DECODER.bits // 2
    loads = ()
    for i in tl.static_range(LOADS):
        loads = loads + (decode(packed[FIRST + i], codebook, DECODER, DTYPE),)
    fields = ()
    for s in tl.static_range(4):
        for p in tl.static_range(PLANES):
            fields = fields + (loads[s % LOADS][s // LOADS * PLANES + p],)
    return fields


@triton.jit
def _load_groups(at, group, G, GROUPS: tl.constexpr, WIDE: tl.constexpr):
    """The scales of GROUPS groups from `group` on, [BLOCK_N] each. Beyond the last group they are any of their row."""
    values = ()
    if WIDE == 1:
        for i in tl.static_range(GROUPS):
            values = values + (tl.load(at + tl.minimum(group + i, G - 1)),)
    else:
        DTYPE: tl.constexpr = at.dtype.element_ty
        WORD: tl.constexpr = tl.int64 if WIDE == 4 else tl.int32
        for i in tl.static_range(GROUPS // WIDE):
            word = tl.load((at + tl.minimum(group + i * WIDE, G - WIDE)).to(tl.pointer_type(WORD)))
            for j in tl.static_range(WIDE):
                values = values + ((word >> 16 * j).to(tl.int16).to(DTYPE, bitcast=True),)
    return values


@triton.jit
def _add_group(acc, part, total, scale, offset, HAS_OFFSET: tl.constexpr, UNIT: tl.constexpr, CENTER: tl.constexpr):
    """acc + scale * part + (offset / UNIT + CENTER * scale) * total; part = sum of value * x, total = sum of x."""
    scale = scale.to(tl.float32)
    acc += scale[:, None] * part
    if HAS_OFFSET:
        shift = offset.to(tl.float32)
        if UNIT != 1.0:
            shift *= 1.0 / UNIT
        if CENTER != 0.0:
            shift += CENTER * scale
        acc += shift[:, None] * total
    elif CENTER != 0.0:
        acc += (CENTER * scale)[:, None] * total
    return acc


@triton.jit
def _finish(
    acc, x, lora_A, lora_B, adapter_ids, bias, y, workspace, counters, M, N, K, R, S, tile, row_block,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds adapters and bias to acc [BLOCK_N, BLOCK_M] and stores its transpose into y."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    if lora_A is not None:
        acc = lora_up(
            acc, x, lora_B, adapter_ids, _lora_memory(workspace, N, SPLITS, BLOCK_M, BLOCK_N), counters,
            M, N, K, R, S, n, row_block, BLOCK_M, BLOCK_N, BLOCK_R, CHUNK,
        )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], acc.to(y.dtype.element_ty), mask=mask)
