"""Packed bytes to values inside a kernel: one function for all kernels, as inline PTX or as plain Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def setup_decode(zero, SETUP: tl.constexpr):
    """Once a kernel, ahead of `decode`: puts tables into registers. zero: an int that is 0, unknown to the compiler."""
    if SETUP != "":
        tl.inline_asm_elementwise(SETUP, "=r,r", [zero], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def decode(packed, codebook, ASM: tl.constexpr, TABLE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """packed [N, B] uint8 -> the fields of the bytes, each [N, B] of DTYPE: field i is slice i of a tile's columns.

    ASM: PTX of a `Decoder`, after `setup_decode`. Without: ``codebook[code]`` if TABLE (float32 [2^BITS]), or the code.
    What the fields of a `Decoder` mean is told there.
    """
    if ASM == "":
        return _decode_portable(packed, codebook, TABLE, BITS, DTYPE)
    elif tl.bfloat16 == DTYPE:
        return _decode_bfloat16(packed, ASM, BITS)
    elif tl.float16 == DTYPE:
        return _decode_float16(packed, ASM, BITS)
    else:
        return _decode_float32(packed, ASM, BITS)


@triton.constexpr_function
def _line(text, i):
    return text.split("\n")[i] if text else ""


@triton.jit
def constant_like(packed, ASMS: tl.constexpr, LINE: tl.constexpr, VALUE: tl.constexpr, DTYPE: tl.constexpr):
    """VALUE in the shape of packed, by a line of ASMS and formally out of packed, so that Triton wants x in the same
    order of registers as for decoded values."""
    ASM: tl.constexpr = _line(ASMS, LINE)
    if ASM == "":
        return tl.full(packed.shape, VALUE, tl.float32).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)


# The types of asm results have to be literals. int8 in bfloat16 comes in two planes (see `Decoder`).


@triton.jit
def _decode_bfloat16(packed, ASM: tl.constexpr, BITS: tl.constexpr):
    if BITS == 2:
        return tl.inline_asm_elementwise(
            ASM,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )


@triton.jit
def _decode_float16(packed, ASM: tl.constexpr, BITS: tl.constexpr):
    if BITS == 2:
        return tl.inline_asm_elementwise(
            ASM,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    elif BITS == 4:
        return tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return (tl.inline_asm_elementwise(ASM, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4),)


@triton.jit
def _decode_float32(packed, ASM: tl.constexpr, BITS: tl.constexpr):
    if BITS == 2:
        return tl.inline_asm_elementwise(
            ASM,
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [packed], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )


@triton.jit
def _decode_portable(packed, codebook, TABLE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    if BITS == 2:
        return (
            _field(packed, codebook, 0, TABLE, BITS, DTYPE),
            _field(packed, codebook, 2, TABLE, BITS, DTYPE),
            _field(packed, codebook, 4, TABLE, BITS, DTYPE),
            _field(packed, codebook, 6, TABLE, BITS, DTYPE),
        )
    elif BITS == 4:
        return (
            _field(packed, codebook, 0, TABLE, BITS, DTYPE),
            _field(packed, codebook, 4, TABLE, BITS, DTYPE),
        )
    else:
        return (_field(packed, codebook, 0, TABLE, BITS, DTYPE),)


@triton.jit
def _field(packed, codebook, SHIFT: tl.constexpr, TABLE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    code = (packed.to(tl.int32) >> SHIFT) & ((1 << BITS) - 1)
    if TABLE:
        return tl.load(codebook + code).to(DTYPE)
    else:
        return code.to(DTYPE)
