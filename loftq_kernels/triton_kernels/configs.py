"""Launch configurations of every kernel as data, what makes one valid, and how one is chosen. Touches no device.

The table's figures were chosen by what ptxas makes of them (``python -m bench sass``): instructions a weight for
decode, the largest tile without spills for the others. ``LOFTQ_AUTOTUNE=1`` measures instead: see `autotune`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

TILE = 64  # columns: the tile of the storage contract
SHARED_MEMORY = {
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}  # bytes a block
KERNELS = ("decode", "prefill", "grad_input")
SHAPES = ("small", "tall")
DECODE_BLOCK_M = (8, 16)  # columns of an mma instruction; fewer rows of x are padded
ANY = 0  # in a key: bits or rows that a row of the table does not depend on
MOST_ROWS = 4096  # more rows of x than this are tuned as this many
MOST_ACCUMULATORS = 128  # a thread of a large tile
# In shapes that are no multiples of 16, whose elements are loaded and stored one by one: with more, ptxas spills.
MOST_ACCUMULATORS_UNALIGNED = 32


class Key(NamedTuple):
    """What a configuration is for. rows: a power of two; shape: one of SHAPES, or "" for any."""

    kernel: str
    architecture: int  # 90 for compute capability 9.0
    bits: int
    rows: int
    shape: str


@dataclass(frozen=True)
class Config:
    """How a kernel is cut up.

    block_m: rows of x (or grad_y) a program. block_n: rows of y's transpose a program has, which are the weight's (for
    grad_input columns of grad_x). block_k: what is summed over at a time; decode: columns of whole tiles; grad_input:
    rows of the weight; prefill: TILE, which the format fixes. fill: programs a multiprocessor below which decode and
    prefill split K; 0: they do not.
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
        """Registers a thread that hold sums."""
        return self.block_m * self.block_n // (32 * self.num_warps)

    def for_group(self, group_size: int) -> Config:
        """Decode: the configuration with steps that hold whole groups."""
        return self if self.block_k >= group_size else replace(self, block_k=group_size)


# Of several configurations the first that fits the rows and, split or not, fills the device is taken: largest first.
# Decode has two warps: with four, a tile of 64 rows would become wgmma, which takes the weight through shared memory.
# "tall": enough rows for 64 of them a program to fill the device.
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
        # Decodes a weight once for 256 rows: 1024 clocks of tensor core, up to 720 of issue. Split, it spills.
        Config(256, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 3, 1),
        Config(128, 64, 64, 4, 3, 2),
        Config(64, 64, 64, 4, 4, 2),
        Config(32, 64, 64, 4, 4, 4),
    ),
    # With 128 rows of 2-bit weights Triton 3.6 makes a kernel of nothing but a trap.
    Key("prefill", 100, ANY, ANY, ""): (
        Config(64, 128, 64, 8, 4, 2),
        Config(32, 128, 64, 4, 4, 4),
    ),
    # sm_80's tensor cores take both operands from registers, so warps side by side decode the same weights again.
    Key("grad_input", 80, ANY, ANY, ""): (Config(128, 64, 64, 4, 3), Config(32, 64, 64, 4, 3)),
    # Steps of 64 rows of int8 spill in groups of 32, of which a tile's row has two. 32 rows take 168 registers: three
    # programs a multiprocessor, whose instructions of a step outlast the loads of the next.
    Key("grad_input", 80, 8, ANY, ""): (Config(128, 64, 32, 4, 2), Config(32, 64, 64, 4, 3)),
    Key("grad_input", 90, ANY, ANY, ""): (
        Config(256, 128, 64, 8, 3),  # as prefill's
        Config(128, 128, 64, 8, 3),
        Config(64, 64, 64, 4, 3),
    ),
    Key("grad_input", 100, ANY, ANY, ""): (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 3)),
}
DECODE_FLOAT32 = Config(16, 32, 64, 4, 2, 4)  # without tensor cores: x in float32 stays exact
# What a search tries, besides the table's own: each product of these that is valid.
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
    """a / b, rounded up. `triton.cdiv` is jitted: tens of microseconds on the host."""
    return -(-a // b)


def architectures(capability: int, kernel: str) -> list[int]:
    """Architectures of the kernel's rows that are not newer than a compute capability (10 * major + minor), newest
    first. sm_120 has sm_89's shared memory and sm_80's kind of tensor cores."""
    known = sorted({key.architecture for key in TABLE if key.kernel == kernel}, reverse=True)
    fitting = [number for number in known if number <= (89 if capability >= 120 else capability)]
    if not fitting:
        raise ValueError(f"compute capability {capability / 10} is below {known[-1] / 10}, the oldest that is served")
    return fitting


def bucket(kernel: str, rows: int) -> int:
    """The power of two that stands for `rows` rows of x in keys; for decode, also its block_m."""
    least, most = (DECODE_BLOCK_M[0], DECODE_BLOCK_M[1]) if kernel == "decode" else (32, MOST_ROWS)
    return min(max(1 << (rows - 1).bit_length(), least), most)


def shape_class(out_features: int, multiprocessors: int) -> str:
    return "tall" if out_features >= 64 * 2 * multiprocessors else "small"


def key_of(kernel: str, capability: int, bits: int, rows: int, out_features: int, multiprocessors: int) -> Key:
    """The key of a launch, in the table and in what a search found; its architecture is the device's own."""
    return Key(kernel, capability, bits, bucket(kernel, rows), shape_class(out_features, multiprocessors))


def rows_of_table(key: Key) -> tuple[Config, ...]:
    """The table's configurations for a launch: of the nearest architecture that has any, and there of the row that says
    most about it."""
    numbers = architectures(key.architecture, key.kernel)
    for number, (rows, shape), bits in product(numbers, ((key.rows, key.shape), (ANY, "")), (key.bits, ANY)):
        row = Key(key.kernel, number, bits, rows, shape)
        if row in TABLE:
            return TABLE[row]
    raise ValueError(f"the table has no row for {key}")


def choose(
    kernel: str, capability: int, bits: int, rows: int, out_features: int, in_features: int, multiprocessors: int
) -> Config:
    """The first configuration of the table's row that fills the device, with splits if need be, among those that are
    not larger than the rows; else the smallest of them. in_features: what is summed over."""
    configs = rows_of_table(key_of(kernel, capability, bits, rows, out_features, multiprocessors))
    fitting = [config for config in configs if config.block_m < 2 * max(rows, 16)] or [configs[-1]]
    if out_features % 16 or in_features % 16:
        fitting = [c for c in fitting if c.accumulators <= MOST_ACCUMULATORS_UNALIGNED] or [configs[-1]]
    for config in fitting:
        count = splits(config, bits, rows, out_features, in_features, multiprocessors)
        if 4 * _programs(config, rows, out_features) * count >= 3 * multiprocessors:
            return config
    return fitting[-1]


def splits(config: Config, bits: int, rows: int, out_features: int, in_features: int, multiprocessors: int) -> int:
    """Programs that share a tile's K: doubled while they are too few for the device, the steps are enough, and the
    float32 parts, written and read, are no more bytes than the codes."""
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
    """Registers a thread of decode may have, where ptxas, left alone, stops at 96 or 128 for the sake of more programs
    than there are, and spills: 168 or, with offsets, 128 rows or float32 x, 255, for 6 or 4 programs of 64 threads a
    multiprocessor."""
    if affine or not half or config.block_n >= 128:
        return 255
    return 168 if adapters or (bits == 2 and config.block_m == 16) else None


def why_invalid(kernel: str, config: Config, bits: int, capability: int, group_size: int = TILE) -> str | None:
    """The first rule that a configuration breaks, or None. The one statement of the rules: for the table, for the
    candidates of a search, and for what is read from its cache."""
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
            return "fill=0 programs a multiprocessor"
    else:
        if min(block_m, block_k) < 16 or block_n < TILE:
            return f"{config} is smaller than an instruction's 16, or than a tile"
        if config.accumulators > MOST_ACCUMULATORS:
            return f"{block_m} x {block_n} are {config.accumulators} accumulators a thread, beyond {MOST_ACCUMULATORS}"
        if block_m * block_n < 16 * 8 * config.num_warps:
            return f"{block_m} x {block_n} are less than an instruction for each of {config.num_warps} warps"
        if kernel == "prefill" and block_k != TILE:
            return f"block_k={block_k}: the format fixes a step of {TILE} columns"
    needed = (config.num_stages - 1) * block_k * (block_n * bits // 8 + 2 * block_m)  # bytes of codes and of x
    limit = SHARED_MEMORY[max(known for known in SHARED_MEMORY if known <= max(capability, 80))]
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
