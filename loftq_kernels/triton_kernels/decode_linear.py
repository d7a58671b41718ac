"""The decode-time product: a few rows of x by a packed weight, with the adapters in the same launch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from loftq_kernels.triton_kernels import autotune, configs
from loftq_kernels.triton_kernels.codebooks import codebook_values, make_decoder
from loftq_kernels.triton_kernels.codes import constant_like, decode, setup_decode
from loftq_kernels.triton_kernels.configs import Config, cdiv
from loftq_kernels.triton_kernels.counters import counter_zeros
from loftq_kernels.triton_kernels.decode_lora import CHUNK, counters_of, down_plan, draw_ticket, lora_down, lora_up
from loftq_kernels.triton_kernels.lora import block_r
from loftq_kernels.triton_kernels.tiles import add_parts

# Columns of x and of the weight that are multiplied at a time. A thread's four bytes are then four consecutive columns
# of one instruction, and x leaves shared memory in its order of registers; 32 columns cost two moves an instruction.
SLICE: tl.constexpr = tl.constexpr(16)


# Not M, of which `setup_decode` makes a zero: a constant 1 would tell ptxas the tables that it must not know.
@triton.jit(do_not_specialize=["M", "row_units", "num_downs", "split_tiles", "S"])
def _decode_linear_kernel(
    x,  # [M, K]
    codes,  # [N, row_bytes] uint8
    scale,  # [N, G]
    offset,  # [N, G], or None
    codebook,  # [2^BITS] float32
    lora_A,  # [S, R, K], or None
    lora_B,  # [S, N, R]
    adapter_ids,  # [M] int32 or int64; None: all 0
    bias,  # [N], or None
    y,  # [M, N]
    workspace,  # float32: parts of splits, then what `decode_lora` hands over
    counters,  # int32, zeros, and left so: those of `decode_lora`, then one a tile of y
    M,
    N,
    K,
    row_units,  # bytes of a row of codes, in units of 8
    G,
    R,
    S,
    scaling,
    num_downs,  # programs a block of rows that compute x A^T
    split_tiles,  # tiles of 64 columns that one program multiplies
    BITS: tl.constexpr,
    SETUP: tl.constexpr,
    ASM: tl.constexpr,
    TABLE: tl.constexpr,
    PLANES: tl.constexpr,
    CONSTANTS: tl.constexpr,
    CONSTANT_ASM: tl.constexpr,
    UNIT: tl.constexpr,
    CENTER: tl.constexpr,
    GROUP: tl.constexpr,  # columns of a group; 0: the row
    EVEN: tl.constexpr,  # K is a multiple of 64 * TILES
    WIDE: tl.constexpr,  # scales that are loaded at a time: 4 or 2, of 16 bits and aligned; or 1
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,  # columns of x A^T that one program computes
):
    """y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A[id].T) @ lora_B[id].T + bias

    The weight is the left operand and the rows of x are the columns of the right one, so that M = 1 wastes 7 columns of
    an instruction, not 15 rows. Sums over a group are scaled in float32. The first programs compute x A^T, a part each;
    the others wait for its sums with the weights' part done. The last of the programs that share a tile of y adds up
    their parts.

    Devices have been seen to start programs in the order of their index, but CUDA does not promise it, and where there
    are more programs than fit on the device at once, waiting for one that has not started would be waiting for ever. So
    with adapters a program's work is not that of its index but of a ticket drawn at its start: who waits has drawn
    later than those it waits for, which run, and wait for nobody. It costs the latency of one atomic.
    """
    pid = tl.program_id(0)
    row_block = tl.program_id(1)
    if lora_A is None:
        _one_tile(
            x, codes, scale, offset, codebook, lora_A, lora_B, adapter_ids, bias, y, workspace, counters,
            M, N, K, row_units, G, R, S, split_tiles, pid, row_block,
            BITS, SETUP, ASM, TABLE, PLANES, CONSTANTS, CONSTANT_ASM, UNIT, CENTER, GROUP, EVEN, WIDE,
            SPLITS, BLOCK_M, BLOCK_N, TILES, BLOCK_R, CHUNK,
        )  # fmt: skip
    else:
        pid = draw_ticket(counters, R, row_block, BLOCK_R)
        if pid < num_downs:
            lora_down(
                x, lora_A, adapter_ids, _handed_over(workspace, N, SPLITS, BLOCK_M, BLOCK_N), counters,
                M, K, R, S, scaling, num_downs, pid, row_block, BLOCK_M, BLOCK_R, CHUNK,
            )  # fmt: skip
        else:
            _one_tile(
                x, codes, scale, offset, codebook, lora_A, lora_B, adapter_ids, bias, y, workspace, counters,
                M, N, K, row_units, G, R, S, split_tiles, pid - num_downs, row_block,
                BITS, SETUP, ASM, TABLE, PLANES, CONSTANTS, CONSTANT_ASM, UNIT, CENTER, GROUP, EVEN, WIDE,
                SPLITS, BLOCK_M, BLOCK_N, TILES, BLOCK_R, CHUNK,
            )  # fmt: skip


@triton.jit
def _handed_over(workspace, N, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where `decode_lora` has its memory: behind the parts of splits."""
    if SPLITS > 1:
        workspace += tl.num_programs(1) * tl.cdiv(N, BLOCK_N).to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M)
    return workspace


@triton.jit
def _one_tile(
    x, codes, scale, offset, codebook, lora_A, lora_B, adapter_ids, bias, y, workspace, counters,
    M, N, K, row_units, G, R, S, split_tiles, index, row_block,
    BITS: tl.constexpr, SETUP: tl.constexpr, ASM: tl.constexpr, TABLE: tl.constexpr, PLANES: tl.constexpr,
    CONSTANTS: tl.constexpr, CONSTANT_ASM: tl.constexpr, UNIT: tl.constexpr, CENTER: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One split of one tile [BLOCK_M, BLOCK_N] of y; the last split to be done finishes the tile."""
    tile = index // SPLITS
    split = index % SPLITS
    acc = _multiply(
        x, codes, scale, offset, codebook, M, N, K, row_units, G, split_tiles, tile, split, row_block,
        BITS, SETUP, ASM, TABLE, PLANES, CONSTANTS, CONSTANT_ASM, UNIT, CENTER, GROUP, EVEN, WIDE,
        BLOCK_M, BLOCK_N, TILES,
    )  # fmt: skip
    if UNIT != 1.0:
        acc *= UNIT
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
    BITS: tl.constexpr, SETUP: tl.constexpr, ASM: tl.constexpr, TABLE: tl.constexpr, PLANES: tl.constexpr,
    CONSTANTS: tl.constexpr, CONSTANT_ASM: tl.constexpr, UNIT: tl.constexpr, CENTER: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """(codebook[codes] * scale + offset) @ x.T / UNIT over one split of K: float32 [BLOCK_N, BLOCK_M]."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    LOADS: tl.constexpr = BITS // 2  # slices of bytes, a tile
    CORRECT: tl.constexpr = len(CONSTANTS) > 0
    SUMS: tl.constexpr = CENTER != 0.0 or offset is not None
    HALVES: tl.constexpr = GROUP == 32  # two groups a tile
    # Tiles that are summed unscaled; large constants are to cancel before much is added to them.
    SPAN: tl.constexpr = (1 if CORRECT else TILES) if GROUP == 0 else (1 if HALVES else GROUP // 64)
    GROUPS: tl.constexpr = (2 if HALVES else 1) * (TILES // SPAN)  # an iteration
    # A thread that is given a whole row of the bytes keeps it, and Triton then decodes ahead of shared memory, at three
    # times the instructions: so rows of 16 bytes are not to be known as aligned to 16.
    row_bytes = row_units * 8

    setup_decode(M >> 31, SETUP)
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

    # Zeros of which ptxas cannot know, other ones in the two halves of an instruction's 16 rows: see `constant_like`.
    # Some bytes out of which ptxas makes the constants: the same in all instructions' operands (so that rows share the
    # products with constants), but others in an operand's four registers (so that ptxas keeps them in four).
    some = (tl.arange(0, BLOCK_N)[:, None] // 8 % 2 * 4 + k[None, :]) % SLICE
    constants = _constants(tl.load(codes + some), CONSTANTS, CONSTANT_ASM, DTYPE)
    zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = zeros
    total = zeros
    for t in range(first, last, TILES):
        packed = _load_codes(codes_at, row_bytes - t * (LOADS * SLICE), k, TILES * LOADS, EVEN)
        next_scales = scales
        next_offsets = offsets
        if GROUP:  # loaded a whole iteration ahead of their use
            group += GROUPS
            next_scales = _load_groups(scale_at, group, G, GROUPS, WIDE)
            if offset is not None:
                next_offsets = _load_groups(offset_at, group, G, GROUPS, WIDE)
        for b in tl.static_range(TILES // SPAN):
            xs = _load_x(x_at + b * (SPAN * 64), K - (t + b * SPAN) * 64, k, 4 * SPAN, EVEN)
            part = zeros
            if GROUP:
                total = zeros
            # Constants first: all rows of the weight share their products.
            if SUMS:
                total = _sum(constants[len(CONSTANTS)], xs, 0, 2 if HALVES else 4 * SPAN, total)
            if CORRECT:
                part = _correct(constants, xs, 0, 2 if HALVES else 4 * SPAN, LOADS, PLANES, part)
            for u in tl.static_range(SPAN):
                fields = _decode_tile(packed, (b * SPAN + u) * LOADS, codebook, ASM, TABLE, BITS, PLANES, DTYPE)
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
                acc += part  # of which the constants' large terms have cancelled
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
    """acc + the sums of the slices FIRST..LAST of x, in every row."""
    for i in tl.static_range(FIRST, LAST):
        acc = _dot(ones, xs[i], acc)
    return acc


@triton.jit
def _correct(constants, xs, FIRST: tl.constexpr, LAST: tl.constexpr, LOADS: tl.constexpr, PLANES: tl.constexpr, acc):
    """acc + what the constants of a `Decoder` add to the products with the slices FIRST..LAST of x."""
    for i in tl.static_range(FIRST, LAST):
        for p in tl.static_range(PLANES):
            acc = _dot(constants[i % 4 // LOADS * PLANES + p], xs[i], acc)
    return acc


@triton.jit
def _constants(packed, CONSTANTS: tl.constexpr, CONSTANT_ASM: tl.constexpr, DTYPE: tl.constexpr):
    """The matrices that correct the fields, and one of ones: [BLOCK_N, SLICE] each."""
    values = ()
    for i in tl.static_range(len(CONSTANTS)):
        values = values + (constant_like(packed, CONSTANT_ASM, i, CONSTANTS[i], DTYPE),)
    return values + (constant_like(packed, CONSTANT_ASM, -1, 1.0, DTYPE),)


@triton.jit
def _load_x(at, left, k, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """COUNT slices [SLICE, BLOCK_M] of the columns of x at `at`, of which `left` are there."""
    xs = ()
    for i in tl.static_range(COUNT):
        if EVEN:
            xs = xs + (tl.load(at + i * SLICE),)
        else:
            xs = xs + (tl.load(at + i * SLICE, mask=(k < left - i * SLICE)[:, None], other=0.0),)
    return xs


@triton.jit
def _load_codes(at, left, k, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """COUNT slices [BLOCK_N, SLICE] of the bytes at `at`, of which `left` are there."""
    packed = ()
    for i in tl.static_range(COUNT):
        if EVEN:
            packed = packed + (tl.load(at + i * SLICE),)
        else:
            packed = packed + (tl.load(at + i * SLICE, mask=(k < left - i * SLICE)[None, :], other=0),)
    return packed


@triton.jit
def _decode_tile(
    packed, FIRST: tl.constexpr, codebook, ASM: tl.constexpr, TABLE: tl.constexpr, BITS: tl.constexpr,
    PLANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The tile of 64 columns in packed[FIRST] and following: 4 * PLANES [BLOCK_N, SLICE], by columns."""
    LOADS: tl.constexpr = BITS // 2
    loads = ()
    for i in tl.static_range(LOADS):
        loads = loads + (decode(packed[FIRST + i], codebook, ASM, TABLE, BITS, DTYPE),)
    fields = ()
    for s in tl.static_range(4):
        for p in tl.static_range(PLANES):
            fields = fields + (loads[s % LOADS][s // LOADS * PLANES + p],)
    return fields


@triton.jit
def _load_groups(at, group, G, GROUPS: tl.constexpr, WIDE: tl.constexpr):
    """The scales of the groups from `group` on, a tuple of [BLOCK_N]; beyond the last, any of its row."""
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
            acc, x, lora_B, adapter_ids, _handed_over(workspace, N, SPLITS, BLOCK_M, BLOCK_N), counters,
            M, N, K, R, S, n, row_block, BLOCK_M, BLOCK_N, BLOCK_R, CHUNK,
        )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], acc.to(y.dtype.element_ty), mask=mask)


# ---- launcher: a decode step calls it hundreds of times, so that all that shapes decide is decided once a shape


class Plan(NamedTuple):
    """What shapes decide of a launch."""

    block_m: int
    splits: int
    grid: tuple[int, int]
    workspace: int  # float32 elements
    counters: int
    sizes: tuple[int, ...]  # the kernel's row_units, G, R, S
    downs: int
    split_tiles: int
    constexprs: dict[str, object]


_plans: dict[tuple, Plan] = {}


def decode_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    group_size: int,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """y = x @ (codebook[codes] * scale + offset).T + scaling * (x @ lora_A[id].T) @ lora_B[id].T + bias, in one launch.

    Args:
        x: [..., K] contiguous, float16, bfloat16 or float32; meant for M <= 16 rows, right for
            any that make up to 65535 blocks of rows.
        codes, scale, offset, codebook, group_size: the stored weight [N, K].
        lora_A, lora_B: [R, K] and [N, R], or [S, R, K] and [S, N, R]; contiguous, of x's dtype. Both or neither.
        adapter_ids: [M] int32 or int64, which of the S adapters a row has: -1 for none. A row with an id below, or of
            S and more, becomes NaN (not where R or S is 0: then ids are not read). None: all rows have the first.
        bias: [N], contiguous.
        config, splits: in place of the table's.
    """
    shape, out_features = x.shape, codes.shape[0]
    columns = shape[-1]
    y = x.new_empty((*shape[:-1], out_features))
    if y.numel() == 0:
        return y
    if columns == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(y.shape))
    device, dtype, affine = x.device, x.dtype, offset is not None
    rows = x.numel() // columns
    lora = None if lora_A is None else lora_A.shape
    entries = codebook_values(codebook)
    aligned = scale.data_ptr() % 8 == 0 and (offset is None or offset.data_ptr() % 8 == 0)
    scales = scale.dtype, aligned
    by_row = adapter_ids is not None
    key = rows, columns, out_features, group_size, device, dtype, scales, affine, lora, by_row, entries, config, splits
    plan = _plans.get(key)
    if plan is None:
        if config is None and autotune.enabled(device) and dtype != torch.float32:
            arguments = x, codes, scale, offset, codebook, group_size, lora_A, lora_B, adapter_ids, scaling, bias
            config = _tuned(key, arguments)
        if len(_plans) >= 4096:
            _plans.clear()
        plan = _plans[key] = _plan(*key[:-2], config, splits)
    workspace = counters = None
    if plan.workspace:
        workspace = torch.empty(plan.workspace, dtype=torch.float32, device=device)
        counters = counter_zeros(device, plan.counters)
    if plan.downs == 0:
        lora_A = lora_B = adapter_ids = None
    _decode_linear_kernel[plan.grid](
        x,
        codes,
        scale,
        offset,
        codebook,
        lora_A,
        lora_B,
        adapter_ids,
        bias,
        y,
        workspace,
        counters,
        rows,
        out_features,
        columns,
        *plan.sizes,
        scaling,
        plan.downs,
        plan.split_tiles,
        **plan.constexprs,
    )
    return y


def _plan(
    rows: int,
    columns: int,
    out_features: int,
    group_size: int,
    device: torch.device,
    dtype: torch.dtype,
    scales: tuple[torch.dtype, bool],
    affine: bool,
    lora: tuple[int, ...] | None,
    by_row: bool,
    entries: tuple[float, ...],
    config: Config | None,
    splits: int | None,
) -> Plan:
    capability, multiprocessors = _device(device)
    bits = len(entries).bit_length() - 1
    if config is None and dtype == torch.float32:
        config = configs.DECODE_FLOAT32
    elif config is None:
        config = configs.choose("decode", capability, bits, rows, out_features, columns, multiprocessors)
    config = config.for_group(group_size)
    if splits is None:
        splits = configs.splits(config, bits, rows, out_features, columns, multiprocessors)
    decoder = make_decoder(entries, dtype, asm=not knobs.runtime.interpret, sums=affine)
    rank = 0 if lora is None or 0 in lora else lora[-2]
    groups = 1 if group_size < 0 else cdiv(columns, group_size)
    half = dtype != torch.float32
    registers = configs.decode_registers(config, bits, affine=affine, adapters=rank > 0, half=half)
    block_m = config.block_m
    row_blocks, tiles = cdiv(rows, block_m), cdiv(out_features, config.block_n)
    downs, counters, memory = down_plan(rank, columns, rows, block_m, by_row=by_row)
    parts = row_blocks * tiles * splits * config.block_n * block_m if splits > 1 else 0
    return Plan(
        block_m=block_m,
        splits=splits,
        grid=(downs + tiles * splits, row_blocks),
        workspace=parts + row_blocks * memory,
        counters=row_blocks * (counters + tiles),
        sizes=(
            cdiv(columns, configs.TILE) * bits,
            groups,
            rank,
            lora[0] if lora is not None and len(lora) == 3 else 1,
        ),
        downs=downs,
        split_tiles=cdiv(cdiv(columns, config.block_k), splits) * config.tiles,
        constexprs={
            "BITS": bits,
            "SETUP": decoder.setup,
            "ASM": decoder.asm,
            "TABLE": decoder.table,
            "PLANES": decoder.planes,
            "CONSTANTS": decoder.constants,
            "CONSTANT_ASM": decoder.constant_asm,
            "UNIT": decoder.unit,
            "CENTER": decoder.center,
            "GROUP": max(group_size, 0),
            "EVEN": columns % config.block_k == 0,
            "WIDE": wide(config, group_size, groups, scales[0]) if scales[1] else 1,
            "SPLITS": splits,
            "BLOCK_M": block_m,
            "BLOCK_N": config.block_n,
            "TILES": config.tiles,
            "BLOCK_R": block_r(rank),
            "CHUNK": CHUNK,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **({} if registers is None else {"maxnreg": registers}),
        },
    )


def wide(config: Config, group_size: int, groups: int, dtype: torch.dtype) -> int:
    """Scales of a row that the kernel may load at a time, aligned to as many."""
    if group_size < 0 or dtype == torch.float32:
        return 1
    step = config.block_k // group_size
    return next(count for count in (4, 2, 1) if step % count == 0 and groups % count == 0)


def _tuned(key: tuple, arguments: tuple) -> Config:
    """The fastest configuration for a launch with these arguments, measured unless it is known."""
    rows, _, out_features, group_size, device, _, _, _, _, _, entries, _, _ = key
    capability, multiprocessors = _device(device)
    bits = len(entries).bit_length() - 1
    place = configs.key_of("decode", capability, bits, rows, out_features, multiprocessors)
    return autotune.tuned(place, group_size, device, lambda config: decode_linear(*arguments, config=config))


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Compute capability (10 * major + minor) and multiprocessors; in the interpreter those of a small sm_80."""
    if device.type != "cuda":
        return 80, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
