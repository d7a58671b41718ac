"""What the kernels of large tiles share: the order of tiles, sums of splits, and scaled operands."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .codebooks import Decoder, make_decoder


@triton.jit
def tile_of(index, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SWIZZLE: tl.constexpr):
    """The (row, column) of the tile of that index. Tiles are numbered SWIZZLE columns of tiles at a time, so that those
    that run at the same time share their operands in L2."""
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    band = index // (SWIZZLE * row_tiles)
    width = min(column_tiles - band * SWIZZLE, SWIZZLE)
    within = index % (SWIZZLE * row_tiles)
    return within // width, band * SWIZZLE + within % width


@triton.jit
def add_parts(acc, used, parts, counter, split, SPLITS: tl.constexpr):
    """(whether this program is the last of the SPLITS that add up their acc, then the sum in the order of the splits).

    used: how many columns of acc matter; the others are not stored and come back as zeros.
    parts: float32 memory for SPLITS times acc.
    counter: zero before, and zero again after the last program.
    """
    size: tl.constexpr = acc.shape[0] * acc.shape[1]
    column = tl.arange(0, acc.shape[1])[None, :]
    at = parts + tl.arange(0, acc.shape[0])[:, None] + column * acc.shape[0]
    tl.store(at + split * size, acc, mask=column < used, cache_modifier=".cg")
    tl.debug_barrier()  # All threads' parts are written before one of them counts.
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.debug_barrier()
        tl.store(counter, 0)
        acc = tl.load(at, mask=column < used, other=0.0, cache_modifier=".cg")
        for i in tl.static_range(1, SPLITS):
            acc += tl.load(at + i * size, mask=column < used, other=0.0, cache_modifier=".cg")
    return is_last, acc


@triton.jit
def spread(groups, RUN: tl.constexpr):
    """[R, G] -> [R, G * RUN]: each value is repeated RUN times."""
    wide = tl.broadcast_to(groups[:, :, None], (groups.shape[0], groups.shape[1], RUN))
    return wide.reshape(groups.shape[0], groups.shape[1] * RUN)


@triton.jit
def scaled(field, scale, offset, HAS_OFFSET: tl.constexpr, TILE_DECODER: tl.constexpr, DTYPE: tl.constexpr):
    """unit * (field + shift) * scale + offset, in float32 and rounded once to DTYPE: an operand of a product."""
    value = field.to(tl.float32)
    if TILE_DECODER.shift != 0.0:
        value += TILE_DECODER.shift
    value *= scale * TILE_DECODER.decoder.unit  # scale * unit is computed once per group, not once per weight.
    if HAS_OFFSET:
        value += offset
    return value.to(DTYPE)


class TileDecoder(NamedTuple):
    """What a kernel that multiplies by scaled weights is compiled with: one constexpr, as `Decoder` for decode."""

    decoder: Decoder
    field: tl.dtype  # that fields are decoded to
    shift: float  # decoder.center and the one constant of all fields


@lru_cache(maxsize=256)
def tile_decoder(values: tuple[float, ...], dtype: torch.dtype, ptx: bool, *, along: bool) -> TileDecoder:
    """The `TileDecoder` for a code book's values and x of dtype. along: the kernel sums along the rows of codes.

    Entries are decoded as they are, in float16 if that holds them, because an entry's rounding is the same in all
    weights of its code and adds up. Only along the rows, where an entry is rounded two ways that cancel, and for x in
    bfloat16, which itself rounds 8 times as much, it is rounded to float16: that saves two instructions per weight.
    8-bit codes are left to plain Triton, because PTX's byte permutations cannot select one of 256 entries.
    """
    exact = torch.tensor(values, dtype=torch.float64)
    halves = torch.equal(exact.half().double(), exact)
    rounds = along and dtype == torch.bfloat16 and all(v == 0 or 2.0**-10 <= abs(v) <= 2.0**10 for v in values)
    table = len(values) < 256
    field = torch.float16 if halves or rounds else torch.float32
    decoder = make_decoder(values, field, asm=ptx and table, exact=table)
    return TileDecoder(
        decoder=decoder,
        field=tl.float16 if decoder.asm and field == torch.float16 else tl.float32,
        shift=decoder.center + (decoder.constants[0] if decoder.constants else 0.0),
    )
