"""Which kernel serves a product: decode, large tiles of packed weights (fused), or chunks for a library GEMM (chunked).

Up to `DECODE_ROWS` rows it is decode. Beyond, the clocks of the other two are estimated from the shape, the bits and
the `Device`, and the smaller estimate is taken. `LOFTQ_AUTOTUNE` does not search for the path.
"""

from __future__ import annotations

from . import configs
from .configs import cdiv
from .device import Device

DECODE_ROWS = 16
LAUNCH = 4000  # Clocks that a launch takes beside its work: 2.3 us at 1.75 GHz, assumed.
FUSED_RATE = 0.75  # Of a library GEMM's rate, where instructions are hidden behind the tensor cores: assumed.


def choose_linear(rows: int, out_features: int, in_features: int, bits: int, device: Device, *, half: bool) -> str:
    """ "decode", "prefill" or "chunked" for `qlora_linear` of x [rows, in_features].

    float32 x (half=False) has no tensor-core kernel for large tiles: beyond decode's rows it goes to the library GEMM.
    """
    if rows <= DECODE_ROWS:
        return "decode"
    shape = bits, rows, out_features, in_features
    return "prefill" if half and _fused_is_faster("prefill", shape, device) else "chunked"


def choose_grad_input(rows: int, in_features: int, out_features: int, bits: int, device: Device, *, half: bool) -> str:
    """ "fused" or "chunked" for the gradient [rows, in_features]."""
    shape = bits, rows, in_features, out_features
    return "fused" if half and _fused_is_faster("grad_input", shape, device) else "chunked"


def _fused_is_faster(kernel: str, shape: tuple[int, int, int, int], device: Device) -> bool:
    """shape: bits, rows, columns of the result, what is summed over."""
    return _fused_clocks(kernel, shape, device) <= _chunked_clocks(shape, device)


def _fused_clocks(kernel: str, shape: tuple[int, int, int, int], device: Device) -> float:
    """Waves of programs. Each program hides decoding behind its products or, where decoding takes longer, its products
    behind decoding."""
    bits, rows, columns, summed = shape
    config = configs.choose(kernel, device, *shape)
    splits = configs.splits(config, *shape, device.multiprocessors)
    programs = cdiv(rows, config.block_m) * cdiv(columns, config.block_n) * splits
    issue = device.instructions[kernel][bits] / 128  # Clocks per weight: 4 instructions for 32 lanes issue per clock.
    products = config.block_m / (FUSED_RATE * device.products)
    return LAUNCH + cdiv(programs, device.multiprocessors) * config.block_n * (summed / splits) * max(issue, products)


def _chunked_clocks(shape: tuple[int, int, int, int], device: Device) -> float:
    """Chunks one after the other: decoded into L2, read from there, and multiplied."""
    bits, rows, columns, summed = shape
    weights = columns * summed
    chunks = cdiv(2 * weights, device.chunk_bytes)
    tiles = cdiv(rows, 128) * cdiv(columns, 128 * chunks)  # The library's GEMM may split each tile in 4.
    products = cdiv(rows, 64) * 64 * weights / (device.products * min(4 * tiles, device.multiprocessors))
    return 2 * chunks * LAUNCH + weights * (4 + bits / 8) / device.l2_bytes + products
