"""Every shipped configuration compiled to machine code for GPUs that need not be there."""

from __future__ import annotations

import pytest
import torch

from bench.bench_sass import decode_keys
from bench.sass import TARGETS, compile_decode_linear, machine_code, main_loop, parse
from loftq_kernels.triton_kernels import configs
from loftq_kernels.triton_kernels.configs import (
    DECODE_BLOCK_M,
    DECODE_FLOAT32,
    SHARED_MEMORY,
    TABLE,
    Config,
    Key,
    choose,
    rows_of_table,
    splits,
    why_invalid,
)

# Instructions a weight in the main loop, sm_90, g=64: the limits of the issue, with what the best tile has below them.
LIMITS = {"nf4": 3.6, "nf2": 2.0, "int4": 2.35, "int4_sym": 2.1, "int2_sym": 1.5, "int2": 1.8}
CASES = [
    (format, capability, block_m, "tall")
    for format in ("nf2", "nf4", "int4", "int8")
    for capability in TARGETS
    for block_m in DECODE_BLOCK_M
] + [("int2", 90, rows, shape) for rows in DECODE_BLOCK_M for shape in ("tall", "small")]


def config_of(format: str, capability: int, rows: int, shape: str) -> Config:
    key = next(key for key in decode_keys(format, capability) if (key.rows, key.shape) == (rows, shape))
    return rows_of_table(key)[0]


@pytest.mark.parametrize("format, capability, block_m, shape", CASES)
def test_shipped(format, capability, block_m, shape):
    """With everything that a launch may ask for: adapters to choose from, bias, splits."""
    config = config_of(format, capability, block_m, shape)
    code = machine_code(
        compile_decode_linear(
            format, config, capability, splits=2, rank=16, adapters=True, bias=True, dtype=torch.float16
        )
    )
    assert code.spills == 0
    assert code.shared <= SHARED_MEMORY[capability]
    assert code.tensor_instructions() > 0


@pytest.mark.parametrize("format", LIMITS)
def test_instructions_a_weight(format):
    config = config_of(format, 90, 8, "tall")
    code = machine_code(compile_decode_linear(format, config, 90))
    weights = config.block_n * config.block_k / (32 * config.num_warps)
    assert code.spills == 0
    assert code.loop_instructions() / weights <= LIMITS[format]
    # No weight is moved between lanes or to shared memory: the few shuffles are of the constants that correct fields.
    assert code.loop["SHFL"] <= 16 and code.loop["HGMMA"] == 0


@pytest.mark.parametrize("group_size", [32, 128, 256, -1])
def test_groups(group_size):
    """The other group sizes, with tails of K."""
    config = config_of("int4", 90, 8, "small")
    code = machine_code(compile_decode_linear("int4", config, 90, group_size=group_size, even=False))
    assert code.spills == 0 and code.tensor_instructions() > 0


def test_float32():
    assert machine_code(compile_decode_linear("nf4", DECODE_FLOAT32, 90, dtype=torch.float32)).spills == 0


def test_table_is_valid():
    """By the rules that candidates of a search and rows of its cache are held to."""
    for key, rows in TABLE.items():
        for capability in (*TARGETS, 120):
            if configs.architectures(capability, key.kernel)[0] != key.architecture:
                continue
            for config in rows:
                for bits in (key.bits,) if key.bits else (2, 4, 8):
                    for group_size in (32, 64, 128, 256, -1):
                        fitted = config.for_group(group_size) if key.kernel == "decode" else config
                        assert why_invalid(key.kernel, fitted, bits, capability, group_size) is None
        if key.kernel == "decode":
            assert [config.block_m for config in rows] == [key.rows]


def test_why_invalid():
    for kernel, config, group_size, capability, rule in (
        ("decode", Config(8, 32, 64, 4, 3, 4), 64, 90, "warps"),
        ("decode", Config(8, 32, 128, 2, 3, 4), 256, 90, "256"),
        ("decode", Config(16, 128, 512, 2, 8, 4), 64, 89, "shared memory"),
        ("decode", Config(32, 32, 64, 2, 3, 4), 64, 90, "block_m=32"),
        ("decode", Config(8, 32, 64, 2, 3), 64, 90, "fill"),
        ("prefill", Config(256, 128, 64, 4, 3), 64, 90, "accumulators"),
        ("prefill", Config(64, 64, 32, 4, 3), 64, 90, "block_k"),
        ("prefill", Config(256, 128, 64, 8, 4), 64, 120, "shared memory"),
        ("grad_input", Config(8, 64, 64, 4, 3), 64, 90, "16"),
        ("grad_input", Config(96, 64, 64, 4, 3), 64, 90, "powers of two"),
    ):
        assert rule in why_invalid(kernel, config, 4, capability, group_size)


def test_choice():
    with pytest.raises(ValueError, match="7.5"):
        choose("decode", 75, 4, 1, 4096, 4096, 132)
    config = Config(8, 32, 256, 2, 4, 4)
    assert splits(config, 4, 1, 4096, 4096, 132) == 4  # 512 programs for 132 multiprocessors
    assert splits(config, 4, 1, 1 << 20, 4096, 132) == 1
    assert splits(config, 4, 1, 32, 64, 132) == 1  # one step cannot be shared
    assert splits(Config(64, 64, 64, 4, 4, 2), 4, 64, 4096, 4096, 132) == 4  # 256 programs
    assert splits(Config(64, 64, 64, 4, 4, 2), 2, 64, 4096, 4096, 132) == 2  # parts no larger than the codes
    assert splits(Config(64, 64, 64, 4, 4), 4, 64, 4096, 4096, 132) == 1
    assert choose("decode", 90, 4, 9, 1 << 15, 4096, 132) == TABLE[Key("decode", 80, 4, 16, "tall")][0]
    assert choose("decode", 120, 8, 1, 4096, 4096, 132) == TABLE[Key("decode", 80, 8, 8, "small")][0]
    for rows, sizes in ((4096, (256, 128)), (256, (128, 64)), (64, (64, 64)), (20, (32, 64)), (1, (32, 64))):
        config = choose("prefill", 90, 4, rows, 4096, 4096, 132)
        assert (config.block_m, config.block_n) == sizes
    assert choose("grad_input", 120, 4, 4096, 4096, 4096, 132) in TABLE[Key("grad_input", 80, 0, 0, "")]


def test_a_row_of_a_newer_architecture_leaves_the_others_to_the_older(monkeypatch):
    """What a search printed can be pasted row by row."""
    key, config = Key("decode", 90, 4, 8, "tall"), Config(8, 128, 128, 4, 3, 2)
    monkeypatch.setitem(TABLE, key, (config,))
    assert rows_of_table(key) == (config,)
    assert rows_of_table(key._replace(bits=2)) == TABLE[key._replace(bits=2, architecture=80)]
    assert rows_of_table(key._replace(architecture=89)) == TABLE[key._replace(architecture=80)]


def test_main_loop():
    """The loop that multiplies is found behind a longer one that does not, and not for the outer one around it."""
    lines = [".L_a:", *["/*0000*/ IADD3 R1, R1, R2 ;"] * 9, "/*0010*/ @P0 BRA `(.L_a) ;"]
    lines += [".L_b:", "/*0020*/ MOV R1, R2 ;", ".L_c:", "/*0030*/ @!P1 HMMA.16816.F32 R0, R4, R8, R0 ;"]
    lines += ["/*0040*/ @P0 BRA `(.L_c) ;", "/*0050*/ @P1 BRA `(.L_b) ;", "/*0060*/ BRA `(.L_end) ;", ".L_end:"]
    instructions, loops = parse("\n".join("  " + line if "/*" in line else line for line in lines))
    assert len(loops) == 3
    assert main_loop(instructions, loops) == {"HMMA": 1, "BRA": 1}
