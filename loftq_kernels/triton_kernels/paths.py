"""Which kernel serves a product: decode, large tiles of packed weights (fused), or chunks for a library GEMM (chunked).

Up to `DECODE_ROWS` rows it is decode. Beyond, the clocks of the other two are estimated from the shape, the bits and
the device, and the smaller estimate is taken. The figures of `DEVICES` are counted (products, instructions: docs/
gpu_kernels.md) or assumed (marked so), none is measured; `LOFTQ_AUTOTUNE` does not search for the path.
"""

from __future__ import annotations

from dataclasses import dataclass

from loftq_kernels.triton_kernels import configs
from loftq_kernels.triton_kernels.configs import cdiv

DECODE_ROWS = 16
LAUNCH = 4000  # clocks that a launch takes beside its work: 2.3 us at 1.75 GHz, assumed
FUSED_RATE = 0.75  # of a library GEMM's, where instructions are hidden behind the tensor cores: assumed


@dataclass(frozen=True)
class Device:
    """products: multiply-adds a clock of a multiprocessor's tensor cores, 16-bit. l2_bytes: what L2 moves a clock,
    assumed. chunk_bytes: of a dense chunk, small enough to stay in L2 between its decoding and its product.
    instructions: a weight of the fused loops, by kernel and bits."""

    products: int
    l2_bytes: int
    chunk_bytes: int
    instructions: dict[str, dict[int, int]]


_AMPERE = {"prefill": {2: 12, 4: 12, 8: 17}, "grad_input": {2: 38, 4: 48, 8: 32}}
DEVICES = {
    80: Device(1024, 3000, 16 << 20, _AMPERE),  # A100: 40 MB of L2 in two halves
    89: Device(512, 2000, 24 << 20, _AMPERE),
    90: Device(2048, 3000, 24 << 20, {"prefill": {2: 9, 4: 9, 8: 11}, "grad_input": {2: 11, 4: 11, 8: 10}}),  # 50 MB
    100: Device(4096, 4000, 48 << 20, {"prefill": {2: 8, 4: 8, 8: 7}, "grad_input": {2: 11, 4: 11, 8: 9}}),
}


def device_of(capability: int) -> Device:
    """The newest that is not newer than the capability; sm_120 has sm_89's tensor cores."""
    capability = 89 if capability >= 120 else capability
    return DEVICES[max((known for known in DEVICES if known <= capability), default=min(DEVICES))]


def choose_linear(
    rows: int, out_features: int, in_features: int, bits: int, capability: int, multiprocessors: int, *, half: bool
) -> str:
    """ "decode", "prefill" or "chunked" for `qlora_linear` of x [rows, in_features].

    float32 x has no tensor-core kernel for large tiles: beyond decode's rows it goes to the library GEMM.
    """
    if rows <= DECODE_ROWS:
        return "decode"
    shape = bits, rows, out_features, in_features
    return "prefill" if half and _fused_is_faster("prefill", shape, capability, multiprocessors) else "chunked"


def choose_grad_input(
    rows: int, in_features: int, out_features: int, bits: int, capability: int, multiprocessors: int, *, half: bool
) -> str:
    """ "fused" or "chunked" for the gradient [rows, in_features]."""
    shape = bits, rows, in_features, out_features
    return "fused" if half and _fused_is_faster("grad_input", shape, capability, multiprocessors) else "chunked"


def _fused_is_faster(kernel: str, shape: tuple[int, int, int, int], capability: int, multiprocessors: int) -> bool:
    """shape: bits, rows, columns of the result, what is summed over."""
    device = device_of(capability)
    fused = _fused_clocks(kernel, shape, device, capability, multiprocessors)
    return fused <= _chunked_clocks(shape, device, multiprocessors)


def _fused_clocks(
    kernel: str, shape: tuple[int, int, int, int], device: Device, capability: int, multiprocessors: int
) -> float:
    """Waves of programs, each of which decodes its weights behind its products or, if that is more, products behind
    decoding."""
    bits, rows, columns, summed = shape
    config = configs.choose(kernel, capability, *shape, multiprocessors)
    splits = configs.splits(config, *shape, multiprocessors)
    programs = cdiv(rows, config.block_m) * cdiv(columns, config.block_n) * splits
    issue = device.instructions[kernel][bits] / 128  # clocks a weight: 4 instructions for 32 lanes each a clock
    products = config.block_m / (FUSED_RATE * device.products)
    return LAUNCH + cdiv(programs, multiprocessors) * config.block_n * (summed / splits) * max(issue, products)


def _chunked_clocks(shape: tuple[int, int, int, int], device: Device, multiprocessors: int) -> float:
    """Chunks one after the other: decoded into L2 and read from there, and multiplied."""
    bits, rows, columns, summed = shape
    weights = columns * summed
    chunks = cdiv(2 * weights, device.chunk_bytes)
    tiles = cdiv(rows, 128) * cdiv(columns, 128 * chunks)  # of the library's GEMM, which may split each in 4
    products = cdiv(rows, 64) * 64 * weights / (device.products * min(4 * tiles, multiprocessors))
    return 2 * chunks * LAUNCH + weights * (4 + bits / 8) / device.l2_bytes + products
