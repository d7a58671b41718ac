"""Launch configurations as data, and what makes one valid. Nothing here touches a device."""

from __future__ import annotations

from dataclasses import dataclass

TILE = 64  # columns: the tile of the storage contract
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block, by compute capability
DECODE_BLOCK_M = (8, 16)  # columns of an mma instruction; fewer rows of x are padded


@dataclass(frozen=True)
class DecodeConfig:
    """How `decode_linear` is cut up: a program has `block_n` rows of the weight and reads `tiles` * 64 columns a step.

    `fill`: programs a multiprocessor below which K is split among programs.
    """

    block_n: int
    tiles: int
    num_warps: int
    num_stages: int
    fill: int

    def for_group(self, group_size: int) -> DecodeConfig:
        """The configuration with steps that hold whole groups."""
        tiles = max(self.tiles, group_size // TILE)
        return (
            self
            if tiles == self.tiles
            else DecodeConfig(self.block_n, tiles, self.num_warps, self.num_stages, self.fill)
        )


# By (architecture, bits, block_m, shape class); chosen by instructions a weight in the main loop, as `python -m bench
# sass` counts them; not yet measured on a device. Two warps: with four, a tile of 64 rows would become wgmma, which
# takes the weight through shared memory. "tall": enough rows for 64 of them a program to fill the device.
_DECODE = {
    ("sm80", 2, 8, "tall"): DecodeConfig(64, 4, 2, 4, 4),
    ("sm80", 2, 8, "small"): DecodeConfig(32, 4, 2, 4, 4),
    ("sm80", 2, 16, "tall"): DecodeConfig(64, 4, 2, 4, 4),
    ("sm80", 2, 16, "small"): DecodeConfig(32, 4, 2, 4, 4),
    ("sm80", 4, 8, "tall"): DecodeConfig(64, 4, 2, 4, 4),
    ("sm80", 4, 8, "small"): DecodeConfig(32, 4, 2, 4, 4),
    ("sm80", 4, 16, "tall"): DecodeConfig(64, 2, 2, 4, 4),
    ("sm80", 4, 16, "small"): DecodeConfig(32, 4, 2, 4, 4),
    ("sm80", 8, 8, "tall"): DecodeConfig(64, 2, 2, 4, 4),
    ("sm80", 8, 8, "small"): DecodeConfig(32, 2, 2, 4, 4),
    ("sm80", 8, 16, "tall"): DecodeConfig(32, 2, 2, 4, 4),  # 64 rows spill with adapters
    ("sm80", 8, 16, "small"): DecodeConfig(32, 2, 2, 4, 4),
}
_DECODE_FLOAT32 = DecodeConfig(32, 1, 4, 2, 4)  # without tensor cores: x in float32 stays exact


def architecture(capability: int) -> str:
    """The newest architecture at or below a compute capability (10 * major + minor) that has rows of its own."""
    names = sorted({int(key[0][2:]) for key in _DECODE})
    fitting = [number for number in names if number <= capability]
    if not fitting:
        raise ValueError(f"compute capability {capability / 10} is below {names[0] / 10}, the oldest that is served")
    return f"sm{fitting[-1]}"


def decode_config(capability: int, bits: int, rows: int, out_features: int, multiprocessors: int, float32: bool):
    """(block_m, configuration) for `rows` rows of x."""
    block_m = DECODE_BLOCK_M[0] if rows <= DECODE_BLOCK_M[0] else DECODE_BLOCK_M[1]
    if float32:
        return 16, _DECODE_FLOAT32
    shape = "tall" if out_features >= 64 * 2 * multiprocessors else "small"
    return block_m, _DECODE[architecture(capability), bits, block_m, shape]


def decode_configs() -> dict[tuple[str, int, int, str], DecodeConfig]:
    """Every row of the table."""
    return dict(_DECODE)


def splits(config: DecodeConfig, out_features: int, in_features: int, multiprocessors: int) -> int:
    """Programs that share a tile's K: doubled while programs are too few for the device, and steps enough to share."""
    programs = -(-out_features // config.block_n)
    steps = -(-in_features // (TILE * config.tiles))
    count = 1
    while count < 16 and 4 * programs * count < 3 * config.fill * multiprocessors and steps >= 4 * count:
        count *= 2
    return count


def why_invalid(config: DecodeConfig, bits: int, block_m: int, group_size: int, capability: int) -> str | None:
    """The first rule that a configuration breaks, or None. The one statement of the rules, for table and search."""
    if config.block_n < 16 * config.num_warps:
        return f"block_n={config.block_n} leaves {config.num_warps} warps less than the 16 rows of an instruction"
    if group_size > 0 and config.tiles * TILE % group_size:
        return f"tiles={config.tiles} do not hold whole groups of {group_size}"
    needed = (config.num_stages - 1) * config.tiles * TILE * (config.block_n * bits // 8 + 2 * block_m)
    limit = SHARED_MEMORY[max(known for known in SHARED_MEMORY if known <= capability)]
    if needed > limit:
        return f"{needed} bytes of shared memory are more than the {limit} of capability {capability / 10}"
    return None
