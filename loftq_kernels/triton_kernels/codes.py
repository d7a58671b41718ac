"""Packed bytes to values inside a kernel: one function for all kernels, as inline PTX or as plain Triton.

Kernels take a `codebooks.Decoder`, all of it known at compile time, as one constexpr argument named DECODER.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def setup_decode(zero, DECODER: tl.constexpr):
    """Puts a decoder's tables into registers, once per kernel and before `decode`. zero: an int that is 0, which the
    compiler must not know."""
    if DECODER.setup != "":
        tl.inline_asm_elementwise(DECODER.setup, "=r,r", [zero], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def decode(packed, codebook, DECODER: tl.constexpr, DTYPE: tl.constexpr):
    """packed [N, B] uint8 -> the fields of the bytes, each [N, B] of DTYPE: field i is slice i of a tile's columns.

    With PTX in the decoder, `setup_decode` has to come first; `Decoder` says what the fields mean. Without PTX they are
    ``codebook[code]`` (float32 [2^bits]) where the decoder has a table, and else the codes.
    """
    ASM: tl.constexpr = DECODER.asm
    BITS: tl.constexpr = DECODER.bits
    if ASM == "":
        return _decode_portable(packed, codebook, DECODER, DTYPE)
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
def constant_like(packed, DECODER: tl.constexpr, LINE: tl.constexpr, VALUE: tl.constexpr, DTYPE: tl.constexpr):
    """VALUE in the shape of packed, by a line of the decoder's constant_asm.

    Formally it is computed from packed, so that Triton wants x in the same order of registers as for decoded values.
    """
    ASM: tl.constexpr = _line(DECODER.constant_asm, LINE)
    if ASM == "":
        return tl.full(packed.shape, VALUE, tl.float32).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)


# Triton wants the types of asm results as literals, so there is one function per type. int8 in bfloat16 comes in two
# planes (see `Decoder`).


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
def _decode_portable(packed, codebook, DECODER: tl.constexpr, DTYPE: tl.constexpr):
    fields = ()
    for i in tl.static_range(8 // DECODER.bits):
        fields = fields + (_field(packed, codebook, DECODER.bits * i, DECODER, DTYPE),)
    return fields


@triton.jit
def _field(packed, codebook, SHIFT: tl.constexpr, DECODER: tl.constexpr, DTYPE: tl.constexpr):
    code = (packed.to(tl.int32) >> SHIFT) & ((1 << DECODER.bits) - 1)
    if DECODER.table:
        return tl.load(codebook + code).to(DTYPE)
    else:
        return code.to(DTYPE)
