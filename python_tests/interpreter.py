"""What Triton 3.6's interpreter gets wrong, put right for the tests. Call `repair` after TRITON_INTERPRET=1 is set.

The interpreter keeps bfloat16 as the bits in NumPy's uint16, and then

* multiplies those as integers in `tl.dot`, and converts integers to bfloat16 by taking them for the bits;
* cuts float32 off to bfloat16 instead of rounding it;
* takes int() of arrays of one element, which NumPy 2.4 no longer has.
"""

from __future__ import annotations

import numpy as np


def repair() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch_tensor, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot

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

    interpreter._patch_lang_tensor = patched_tensor
    builder.cast_impl, builder.create_dot = patched_cast, patched_dot


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as its bits -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as its bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = np.where(np.isnan(values), 0x7FC00000, bits + 0x7FFF + (bits >> 16 & 1))
    return (bits >> 16).astype(np.uint16)
