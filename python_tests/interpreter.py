"""What Triton 3.6's interpreter gets wrong, put right for the tests. Call `repair` after TRITON_INTERPRET=1 is set.

The interpreter keeps bfloat16 as the bits in NumPy's uint16, and then

* multiplies those as integers in `tl.dot`, and converts integers to bfloat16 by taking them for the bits;
* cuts float32 off to bfloat16 instead of rounding it;
* takes int() of arrays of one element, which NumPy 2.4 no longer has.

It also refuses inline asm, which `inline_asm` runs.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import ptx


def repair() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch_tensor, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot
    set_index = builder.set_grid_idx

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patched_cast(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in kinds or kinds[0] == kinds[1]:
            return cast(self, src, dst_type)
        if kinds[0] == tl.bfloat16:
            return cast(self, handle(widened(src.data), tl.float32), dst_type)
        return handle(rounded(cast(self, src, tl.float32).data), tl.bfloat16)

    def patched_dot(self, a, b, d, *options):
        a, b = (
            handle(widened(operand.data), tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand
            for operand in (a, b)
        )
        return dot(self, a, b, d, *options)

    def patched_set_index(self, *at):
        self.asm_registers = {}  # Each program has its own.
        set_index(self, *at)

    def patched_asm(self, asm, constraints, values, types, is_pure, pack):
        kinds = [kind.scalar for kind in types]
        data = [interpreter._get_np_dtype(kind) for kind in kinds]
        results = inline_asm(asm, constraints, [value.data for value in values], data, pack, self.asm_registers)
        handles = [handle(result, kind) for result, kind in zip(results, kinds, strict=True)]
        return SimpleNamespace(get_result=handles.__getitem__)

    interpreter._patch_lang_tensor = patched_tensor
    builder.cast_impl, builder.create_dot = patched_cast, patched_dot
    builder.set_grid_idx, builder.create_inline_asm = patched_set_index, patched_asm


def inline_asm(
    asm: str, constraints: str, values: list[np.ndarray], types: list[np.dtype], pack: int, registers: ptx.Registers
) -> list[np.ndarray]:
    """`tl.inline_asm_elementwise`: one array per type, in the shape of values. registers: those of the whole program.

    The asm gets `pack` elements of each value at a time, in as many 32-bit registers as they fill, and yields as many
    of each type: 4 elements are one register of bytes, two of 16-bit floats or four of float32. On a device Triton
    takes elements that follow one another in a thread's registers; here they are neighbours in the last dimension. The
    two agree in the layouts that these kernels have, where a thread loads, or holds of a product's operand, at least
    four bytes of a row. A layout where they do not agree would be seen on a device alone.
    """
    shape, outputs = values[0].shape, [pack * kind.itemsize // 4 for kind in types]
    inputs = [word for value in values for word in _to_words(value, pack)]
    expected = ",".join(["=r"] * sum(outputs) + ["r"] * len(inputs))
    if constraints != expected:
        raise ValueError(f"constraints {constraints}, expected {expected}")
    words = iter(ptx.run(asm, inputs, sum(outputs), registers))
    return [
        _from_words([next(words) for _ in range(n)], kind, shape, pack) for n, kind in zip(outputs, types, strict=True)
    ]


def _to_words(values: np.ndarray, pack: int) -> np.ndarray:
    """[registers, shape's elements / pack]"""
    if values.ndim and values.shape[-1] % pack:
        raise ValueError(f"rows of {values.shape[-1]} are not taken {pack} at a time")
    words = np.ascontiguousarray(values).view(np.uint32)
    return words.reshape(-1, pack * values.itemsize // 4).T


def _from_words(words: list[np.ndarray], kind: np.dtype, shape: tuple[int, ...], pack: int) -> np.ndarray:
    count = np.prod(shape, dtype=int) // pack
    columns = [np.broadcast_to(word, count) for word in words]
    return np.stack(columns, 1).view(kind).reshape(shape)


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as its bits -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as its bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = np.where(np.isnan(values), 0x7FC00000, bits + 0x7FFF + (bits >> 16 & 1))
    return (bits >> 16).astype(np.uint16)
