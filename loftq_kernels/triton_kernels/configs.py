"""Launch configurations of every kernel as data, what makes one valid, and how one is chosen. Touches no device.

The table's figures were chosen by what ptxas makes of them (``python -m bench sass``): the fewest instructions per
weight for decode, the largest tile without spills for the others. ``LOFTQ_AUTOTUNE=1`` measures instead: see
`autotune`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from .contract import TILE
from .device import Device, architecture_of, describe

KERNELS = ("decode", "prefill", "grad_input")
SHAPES = ("small", "tall")
DECODE_BLOCK_M = (8, 16)  # Columns of an mma instruction. Fewer rows of x are padded.
ANY = 0  # In a key: bits or rows that a row of the table does not depend on.
MOST_ROWS = 4096  # More rows of x than this are tuned as this many.
MOST_ACCUMULATORS = 128  # Per thread of a large tile.
# Per thread in shapes that are no multiples of 16: their elements are loaded and stored one by one, and with more
# accumulators ptxas spills.
MOST_ACCUMULATORS_UNALIGNED = 32


class Key(NamedTuple):
    """What a configuration is for. rows: a power of two; shape: one of SHAPES, or "" for any."""

    kernel: str
    architecture: int  # 90 for compute capability 9.0; in a key of a launch the device's own
    bits: int
    rows: int
    shape: str


@dataclass(frozen=True)
class Config:
    """How a kernel's work is divided among programs.

    block_m: rows of x (or grad_y) per program.
    block_n: rows of the weight per program, which are the columns of y (for grad_input: columns of grad_x).
    block_k: what is summed over at a time. For decode columns of whole tiles, for grad_input rows of the weight, for
        prefill TILE, which the format fixes.
    fill: programs per multiprocessor below which decode and prefill split K. With 0 they never split.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    fill: int = 0

    @property
    def tiles(self) -> int:
        return self.block_k // TILE

    @property
    def accumulators(self) -> int:
        """Registers per thread that hold sums."""
        return self.block_m * self.block_n // (32 * self.num_warps)

    def for_group(self, group_size: int) -> Config:
        """For decode: the configuration with steps that hold whole groups."""
        return self if self.block_k >= group_size else replace(self, block_k=group_size)


# Several configurations are listed largest first: the first that fits the rows and, split or not, fills the device is
# taken. Decode has two warps, because with four a tile of 64 rows would become wgmma, which takes the weight through
# shared memory. A shape is "tall" if programs of 64 rows of the weight fill the device.
TABLE: dict[Key, tuple[Config, ...]] = {
    Key("decode", 80, 2, 8, "tall"): (Config(8, 128, 256, 2, 4, 4),),
    Key("decode", 80, 2, 8, "small"): (Config(8, 64, 256, 2, 4, 4),),
    Key("decode", 80, 2, 16, "tall"): (Config(16, 64, 256, 2, 4, 4),),
    Key("decode", 80, 2, 16, "small"): (Config(16, 64, 256, 2, 4, 4),),
    Key("decode", 80, 4, 8, "tall"): (Config(8, 64, 256, 2, 4, 4),),
    Key("decode", 80, 4, 8, "small"): (Config(8, 64, 256, 2, 4, 4),),
    Key("decode", 80, 4, 16, "tall"): (Config(16, 64, 128, 2, 4, 4),),
    Key("decode", 80, 4, 16, "small"): (Config(16, 32, 256, 2, 4, 4),),
    Key("decode", 80, 8, 8, "tall"): (Config(8, 64, 128, 2, 4, 4),),
    Key("decode", 80, 8, 8, "small"): (Config(8, 32, 128, 2, 4, 4),),
    Key("decode", 80, 8, 16, "tall"): (Config(16, 64, 128, 2, 4, 4),),
    Key("decode", 80, 8, 16, "small"): (Config(16, 32, 128, 2, 4, 4),),
    Key("prefill", 80, ANY, ANY, ""): (
        Config(128, 128, 64, 8, 3, 1),
        Config(64, 128, 64, 4, 3, 2),
        Config(32, 64, 64, 4, 4, 4),
    ),
    Key("prefill", 90, ANY, ANY, ""): (
        # It decodes a weight once for 256 rows: 1024 clocks of tensor cores for up to 720 clocks of issue. It spills
        # when it is split.
        Config(256, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 3, 1),
        Config(128, 64, 64, 4, 3, 2),
        Config(64, 64, 64, 4, 4, 2),
        Config(32, 64, 64, 4, 4, 4),
    ),
    # For 128 rows of 2-bit weights Triton 3.6 compiles a kernel that consists of a trap alone.
    Key("prefill", 100, ANY, ANY, ""): (
        Config(64, 128, 64, 8, 4, 2),
        Config(32, 128, 64, 4, 4, 4),
    ),
    # The tensor cores of sm_80 take both operands from registers, so warps side by side decode the same weights.
    Key("grad_input", 80, ANY, ANY, ""): (Config(128, 64, 64, 4, 3), Config(32, 64, 64, 4, 3)),
    # Steps of 64 rows of int8 spill with groups of 32, of which a tile's row has two. Steps of 32 rows take 168
    # registers, which leaves three programs per multiprocessor: their instructions of one step take longer than the
    # loads of the next.
    Key("grad_input", 80, 8, ANY, ""): (Config(128, 64, 32, 4, 2), Config(32, 64, 64, 4, 3)),
    Key("grad_input", 90, ANY, ANY, ""): (
        Config(256, 128, 64, 8, 3),  # As for prefill.
        Config(128, 128, 64, 8, 3),
        Config(64, 64, 64, 4, 3),
    ),
    Key("grad_input", 100, ANY, ANY, ""): (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 3)),
}
DECODE_FLOAT32 = Config(16, 32, 64, 4, 2, 4)  # Without tensor cores, so that x in float32 stays exact.
# What a search tries besides the table's own configurations: each combination of these that is valid.
_CANDIDATES = {
    "decode": {"block_n": (32, 64, 128), "block_k": (64, 128, 256), "num_warps": (2, 4), "num_stages": (3, 4, 6)},
    "prefill": {
        "block_m": (32, 64, 128, 256),
        "block_n": (64, 128),
        "block_k": (64,),
        "num_warps": (4, 8),
        "num_stages": (3, 4),
        "fill": (1, 4),
    },
    "grad_input": {
        "block_m": (32, 64, 128, 256),
        "block_n": (64, 128),
        "block_k": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` is jitted and would take tens of microseconds on the host."""
    return -(-a // b)


def architectures(capability: int, kernel: str) -> list[int]:
    """Architectures of the kernel's rows that serve a compute capability (10 * major + minor), newest first."""
    known = sorted({key.architecture for key in TABLE if key.kernel == kernel}, reverse=True)
    fitting = [number for number in known if number <= architecture_of(capability)]
    if not fitting:
        raise ValueError(f"compute capability {capability / 10} is below {known[-1] / 10}, the oldest that is served")
    return fitting


def bucket(kernel: str, rows: int) -> int:
    """The power of two that stands for `rows` rows of x in keys. For decode it is also the block_m."""
    least, most = (DECODE_BLOCK_M[0], DECODE_BLOCK_M[1]) if kernel == "decode" else (32, MOST_ROWS)
    return min(max(1 << (rows - 1).bit_length(), least), most)


def shape_class(out_features: int, multiprocessors: int) -> str:
    return "tall" if out_features >= 64 * 2 * multiprocessors else "small"


def key_of(kernel: str, device: Device, bits: int, rows: int, out_features: int) -> Key:
    """The key of a launch, in the table and in what a search found."""
    shape = shape_class(out_features, device.multiprocessors)
    return Key(kernel, device.capability, bits, bucket(kernel, rows), shape)


def rows_of_table(key: Key) -> tuple[Config, ...]:
    """The table's configurations for a launch: from the nearest architecture that has any, and there from the row that
    says most about the launch."""
    numbers = architectures(key.architecture, key.kernel)
    for number, (rows, shape), bits in product(numbers, ((key.rows, key.shape), (ANY, "")), (key.bits, ANY)):
        row = Key(key.kernel, number, bits, rows, shape)
        if row in TABLE:
            return TABLE[row]
    raise ValueError(f"the table has no row for {key}")


def choose(kernel: str, device: Device, bits: int, rows: int, out_features: int, in_features: int) -> Config:
    """The first configuration of the table's row that fills the device, with splits if need be, among those that are
    not larger than the rows; else the smallest of them. in_features: what is summed over."""
    configs = rows_of_table(key_of(kernel, device, bits, rows, out_features))
    fitting = [config for config in configs if config.block_m < 2 * max(rows, 16)] or [configs[-1]]
    if out_features % 16 or in_features % 16:
        fitting = [c for c in fitting if c.accumulators <= MOST_ACCUMULATORS_UNALIGNED] or [configs[-1]]
    for config in fitting:
        count = splits(config, bits, rows, out_features, in_features, device.multiprocessors)
        if 4 * _programs(config, rows, out_features) * count >= 3 * device.multiprocessors:
            return config
    return fitting[-1]


def splits(config: Config, bits: int, rows: int, out_features: int, in_features: int, multiprocessors: int) -> int:
    """How many programs share a tile's K. The number is doubled while the programs are too few for the device, each
    has enough steps, and the float32 parts, written and read, are no more bytes than the codes."""
    programs = _programs(config, rows, out_features)
    steps = cdiv(in_features, config.block_k)
    most = in_features * bits // (64 * cdiv(max(rows, 1), config.block_m) * config.block_m)
    count = 1
    while (
        count < 16
        and 2 * count <= most
        and 4 * programs * count < 3 * config.fill * multiprocessors
        and steps >= 4 * count
    ):
        count *= 2
    return count


def _programs(config: Config, rows: int, out_features: int) -> int:
    return cdiv(rows, config.block_m) * cdiv(out_features, config.block_n)


def decode_registers(config: Config, bits: int, *, affine: bool, adapters: bool, half: bool = True) -> int | None:
    """Registers per thread that decode may have, or None where ptxas finds a good number by itself.

    Elsewhere ptxas stops at 96 or 128 registers, to leave room for more programs than there are, and spills. So it is
    given 168, for 6 programs of 64 threads per multiprocessor, or 255, for 4 of them, with offsets, 128 rows of the
    weight or float32 x.
    """
    if affine or not half or config.block_n >= 128:
        return 255
    return 168 if adapters or (bits == 2 and config.block_m == 16) else None


def why_invalid(kernel: str, config: Config, bits: int, capability: int, group_size: int = TILE) -> str | None:
    """The first rule that a configuration breaks, or None. The rules for the table, for the candidates of a search and
    for what is read from its cache are stated here alone."""
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    sizes = block_m, block_n, block_k, config.num_warps
    if any(size < 1 or size & (size - 1) for size in sizes) or not 1 <= config.num_stages <= 8 or config.fill < 0:
        return f"{config} has sizes that are no powers of two, or stages beyond 1..8"
    if kernel == "decode":
        if block_m not in DECODE_BLOCK_M:
            return f"block_m={block_m} is not one of {DECODE_BLOCK_M}"
        if block_n < 16 * config.num_warps:
            return f"block_n={block_n} leaves {config.num_warps} warps less than the 16 rows of an instruction"
        if block_k % TILE or (group_size > 0 and block_k % group_size):
            return f"block_k={block_k} does not hold whole tiles and groups of {group_size}"
        if config.fill < 1:
            return "fill=0 programs per multiprocessor"
    else:
        if min(block_m, block_k) < 16 or block_n < TILE:
            return f"{config} is smaller than an instruction's 16, or than a tile"
        if config.accumulators > MOST_ACCUMULATORS:
            return f"{block_m} x {block_n} are {config.accumulators} accumulators per thread, above {MOST_ACCUMULATORS}"
        if block_m * block_n < 16 * 8 * config.num_warps:
            return f"{block_m} x {block_n} are less than an instruction for each of {config.num_warps} warps"
        if kernel == "prefill" and block_k != TILE:
            return f"block_k={block_k}: the format fixes a step of {TILE} columns"
    needed = (config.num_stages - 1) * block_k * (block_n * bits // 8 + 2 * block_m)  # Bytes of codes and of x.
    limit = describe(capability).shared_memory
    if needed > limit:
        return f"{needed} bytes of shared memory are more than the {limit} of capability {capability / 10}"
    return None


def candidates(key: Key, group_size: int = TILE) -> Iterator[Config]:
    """Valid configurations for a key, the table's own first."""
    seen = set()
    choices = dict(_CANDIDATES[key.kernel])
    if key.kernel == "decode":
        choices = {"block_m": (key.rows,), **choices, "fill": (2, 4, 8)}
    listed = [config.for_group(group_size) if key.kernel == "decode" else config for config in rows_of_table(key)]
    for config in (
        *listed,
        *(Config(**dict(zip(choices, sizes, strict=True))) for sizes in product(*choices.values())),
    ):
        if config.block_m >= 2 * max(key.rows, 32) or config in seen:
            continue
        seen.add(config)
        if why_invalid(key.kernel, config, key.bits, key.architecture, group_size) is None:
            yield config
