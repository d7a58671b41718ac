"""Every shipped configuration compiled to machine code for GPUs that need not be there."""

from __future__ import annotations

import pytest
import torch

from bench.bench_sass import BITS
from bench.sass import TARGETS, compile_decode_linear, machine_code, main_loop, parse
from loftq_kernels.triton_kernels.configs import (
    DECODE_BLOCK_M,
    SHARED_MEMORY,
    TILE,
    DecodeConfig,
    architecture,
    decode_config,
    decode_configs,
    splits,
    why_invalid,
)

# Instructions a weight in the main loop, sm_90, g=64: the limits of the issue, with what the best tile has below them.
LIMITS = {"nf4": 4.1, "nf2": 2.3, "int4": 2.5, "int4_sym": 2.2, "int2_sym": 1.9, "int2": 2.4}
CASES = [
    (format, capability, block_m, "tall")
    for format in ("nf2", "nf4", "int4", "int8")
    for capability in TARGETS
    for block_m in DECODE_BLOCK_M
] + [(format, 90, 16, "small") for format in ("nf2", "nf4", "int4", "int8")]


@pytest.mark.parametrize("format, capability, block_m, shape", CASES)
def test_shipped(format, capability, block_m, shape):
    """With everything that a launch may ask for: adapters to choose from, bias, splits."""
    config = decode_configs()[architecture(capability), BITS.get(format, 4), block_m, shape]
    code = machine_code(
        compile_decode_linear(
            format, config, block_m, capability, splits=2, rank=16, adapters=True, bias=True, dtype=torch.float16
        )
    )
    assert code.spills == 0
    assert code.shared <= SHARED_MEMORY[capability]
    assert code.tensor_instructions() > 0


@pytest.mark.parametrize("format", LIMITS)
def test_instructions_a_weight(format):
    config = decode_configs()[architecture(90), BITS.get(format, 4), 8, "tall"]
    code = machine_code(compile_decode_linear(format, config, 8, 90))
    weights = config.block_n * TILE * config.tiles / (32 * config.num_warps)
    assert code.spills == 0
    assert code.loop_instructions() / weights <= LIMITS[format]
    assert code.loop["SHFL"] == 0 and code.loop["HGMMA"] == 0  # no weight is moved between lanes or to shared memory


@pytest.mark.parametrize("group_size", [32, 128, 256, -1])
def test_groups(group_size):
    """The other group sizes, with tails of K."""
    config = decode_configs()[architecture(90), 4, 8, "small"]
    code = machine_code(compile_decode_linear("int4", config, 8, 90, group_size=group_size, even=False))
    assert code.spills == 0 and code.tensor_instructions() > 0


def test_float32():
    block_m, config = decode_config(90, 4, 1, 4096, 132, True)
    assert machine_code(compile_decode_linear("nf4", config, block_m, 90, dtype=torch.float32)).spills == 0


def test_table_is_valid():
    for (arch, bits, block_m, _), config in decode_configs().items():
        for capability in TARGETS:
            if architecture(capability) == arch:
                for group_size in (32, 64, 128, 256, -1):
                    assert why_invalid(config.for_group(group_size), bits, block_m, group_size, capability) is None


def test_why_invalid():
    assert "warps" in why_invalid(DecodeConfig(32, 1, 4, 3, 4), 4, 8, 64, 90)
    assert "256" in why_invalid(DecodeConfig(32, 2, 2, 3, 4), 4, 8, 256, 90)
    assert "shared memory" in why_invalid(DecodeConfig(128, 8, 2, 8, 4), 4, 16, 64, 89)


def test_choice():
    assert {architecture(capability) for capability in (90, 120)} <= {key[0] for key in decode_configs()}
    with pytest.raises(ValueError, match="7.5"):
        architecture(75)
    config = DecodeConfig(32, 4, 2, 4, 4)
    assert splits(config, 4096, 4096, 132) == 4  # 512 programs for 132 multiprocessors
    assert splits(config, 1 << 20, 4096, 132) == 1
    assert splits(config, 32, 64, 132) == 1  # one step cannot be shared


def test_main_loop():
    """The loop that multiplies is found behind a longer one that does not, and not for the outer one around it."""
    lines = [".L_a:", *["/*0000*/ IADD3 R1, R1, R2 ;"] * 9, "/*0010*/ @P0 BRA `(.L_a) ;"]
    lines += [".L_b:", "/*0020*/ MOV R1, R2 ;", ".L_c:", "/*0030*/ @!P1 HMMA.16816.F32 R0, R4, R8, R0 ;"]
    lines += ["/*0040*/ @P0 BRA `(.L_c) ;", "/*0050*/ @P1 BRA `(.L_b) ;", "/*0060*/ BRA `(.L_end) ;", ".L_end:"]
    instructions, loops = parse("\n".join("  " + line if "/*" in line else line for line in lines))
    assert len(loops) == 3
    assert main_loop(instructions, loops) == {"HMMA": 1, "BRA": 1}
