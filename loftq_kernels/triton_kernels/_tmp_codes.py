import triton
import triton.language as tl

@triton.jit
def decode(packed, codebook, BITS: tl.constexpr, FIELD: tl.constexpr):
    idx = (packed >> (FIELD * BITS)) & (2**BITS - 1)
    return tl.load(codebook + idx.to(tl.int32))
