"""Tiles of the prefill and grad_input kernels, and which way a product goes, by architecture: data, no code to tune.

None of these figures comes from a device yet: tiles are the largest that compile without spills, the crossovers follow
from bytes and instructions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """A tile of block_m rows of x (or grad_y) by block_n columns of the output; block_k: the step of the reduction,
    for the kernels that choose it."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    block_k: int = 64


# Largest first; `choose_tile` takes the first that fills the device.
# sm_89 and sm_120 have 99 KB of shared memory a block.
PREFILL_TILES = {
    80: (TileConfig(128, 128, 8, 3), TileConfig(64, 64, 4, 4), TileConfig(32, 64, 4, 4)),
    90: (
        TileConfig(256, 128, 8, 3),  # decodes a weight once for 256 rows: 1024 clocks of tensor core, 570 of issue
        TileConfig(128, 128, 8, 3),
        TileConfig(128, 64, 4, 3),
        TileConfig(64, 64, 4, 4),
        TileConfig(32, 64, 4, 4),
    ),
    100: (TileConfig(128, 128, 8, 3), TileConfig(64, 128, 4, 4), TileConfig(32, 128, 4, 4)),
}
GRAD_INPUT_TILES = {
    # sm_80's tensor cores take both operands from registers, so warps side by side decode the same weights again.
    80: (TileConfig(128, 64, 4, 3), TileConfig(32, 64, 4, 3)),
    90: (TileConfig(128, 128, 8, 3), TileConfig(64, 64, 4, 3)),
    100: (TileConfig(128, 128, 8, 3), TileConfig(64, 64, 4, 3)),
}


@dataclass(frozen=True)
class Crossover:
    """Rows of x up to which each way serves; beyond the last one, weights are decoded in chunks for a library GEMM.

    chunk_bytes: dense bytes of a chunk, small enough to stay in L2 between its decoding and its product.
    """

    decode: int
    prefill: int
    grad_input: int
    chunk_bytes: int


# Decoding a chunk costs its bytes in L2 whatever M is, 1/4 of a bf16 GEMM's time at M=512 and 1/16 at M=2048 [counted];
# decoding inside the product costs issue slots, a constant share. Unmeasured.
CROSSOVERS = {
    80: Crossover(decode=16, prefill=512, grad_input=128, chunk_bytes=16 << 20),  # A100: 40 MB of L2 in two halves
    89: Crossover(decode=16, prefill=512, grad_input=128, chunk_bytes=24 << 20),
    90: Crossover(decode=16, prefill=1024, grad_input=1024, chunk_bytes=24 << 20),  # H100, H200: 50 MB in two halves
    100: Crossover(decode=16, prefill=512, grad_input=512, chunk_bytes=48 << 20),
}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` takes tens of microseconds on the host."""
    return -(-a // b)


def _nearest(table: dict[int, object], architecture: int):
    """The entry of the newest architecture that is not newer than this one; of sm_80 for older ones."""
    return table[max((known for known in table if known <= architecture), default=min(table))]


def choose_tile(
    tables: dict[int, tuple[TileConfig, ...]], architecture: int, rows: int, columns: int, multiprocessors: int
) -> TileConfig:
    """The largest tile that gives every multiprocessor one, among those not larger than the rows; else the smallest."""
    # sm_120 has sm_89's shared memory and no tcgen05.
    tiles = _nearest(tables, 80 if architecture >= 120 else architecture)
    fitting = [tile for tile in tiles if tile.block_m < 2 * max(rows, 16)] or [tiles[-1]]
    filling = [t for t in fitting if cdiv(rows, t.block_m) * cdiv(columns, t.block_n) >= multiprocessors]
    return (filling or fitting[-1:])[0]


def crossover(architecture: int) -> Crossover:
    return _nearest(CROSSOVERS, architecture)


def choose_path(rows: int, architecture: int, *, half_precision: bool, adapters: bool = False) -> str:
    """ "decode", "prefill" or "chunked" for `qlora_linear` with that many rows of x.

    float32 x has no tensor-core kernel for large tiles: beyond decoding's rows it goes to the library GEMM.
    """
    limits = crossover(architecture)
    if rows <= limits.decode:
        return "decode"
    return "prefill" if half_precision and rows <= limits.prefill else "chunked"
