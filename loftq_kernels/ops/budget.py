"""How exact the kernels are: the limits that tests and ``loftq-kernels check`` hold them to.

Quantize, dequantize and pack have no limit here: their results equal those of `reference`, bit for bit.
"""

from __future__ import annotations

import torch

# The error of a product against float64 (2-norm), at most this many times plain torch's at the same dtype.
PRODUCT = 1.2
# The scalar instruction set has no fused multiply-add: it rounds products as well as sums.
SCALAR_PRODUCT = 2.0
# Triton's float32 products correct decoded codes by sums of x, which leaves some of the last bits, relative to |y|.
TRITON_ALLOWANCE = {torch.float32: 1e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}
# Errors ||W - Q - s B A|| / ||W|| of two drivers of LoftQ after each alternation, relative to each other.
DRIVERS = 3e-3
# The error that an initializer states against that of the tensors it returns, relative.
STATED_ERROR = 1e-4


def of_products(isa: str) -> float:
    """How many times plain torch's error a product may have that is computed by this CPU instruction set."""
    return SCALAR_PRODUCT if isa == "scalar" else PRODUCT


def of_decomposition(size: int, dtype: torch.dtype) -> float:
    """The error of values, vectors and reconstruction of a matrix of this size, relative to its largest value."""
    return 8 * size**0.5 * torch.finfo(dtype).eps
