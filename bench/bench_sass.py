"""What ptxas makes of every shipped kernel configuration: registers, spills, shared memory, instructions a weight.

Needs no GPU. Decode on an H200 at its full bandwidth leaves 4.1 issue slots a weight at 4 bits and 2.2 at 2 bits.
"""

from __future__ import annotations

from pathlib import Path

import triton

from bench import harness
from bench.sass import TARGETS, compile_decode_linear, machine_code
from loftq_kernels.triton_kernels.configs import TILE, architecture, decode_configs

FORMATS = ("nf2", "int2", "int2_sym", "nf4", "int4", "int4_sym", "uniform4", "int8")
BITS = {"nf2": 2, "int2": 2, "int2_sym": 2, "int8": 8, "int8_sym": 8}  # others: 4


def run(output: Path, *, quick: bool) -> None:
    rows = []
    for capability in (90,) if quick else TARGETS:
        rows += [_row(format, capability, *key) for format in FORMATS for key in _keys(format, capability)]
    harness.print_table(rows)
    harness.write_json(output / "sass.json", {"triton": triton.__version__, "group_size": 64, "kernels": rows})


def _keys(format: str, capability: int) -> list[tuple[int, str]]:
    """(block_m, shape class) of the rows that serve a format."""
    return [
        (block_m, shape)
        for arch, bits, block_m, shape in decode_configs()
        if arch == architecture(capability) and bits == BITS.get(format, 4)
    ]


def _row(format: str, capability: int, block_m: int, shape: str) -> dict:
    config = decode_configs()[architecture(capability), BITS.get(format, 4), block_m, shape]
    code = machine_code(compile_decode_linear(format, config, block_m, capability))
    weights = config.block_n * TILE * config.tiles / (32 * config.num_warps)  # a thread, an iteration
    return {
        "kernel": "decode_linear",
        "format": format,
        "target": f"sm_{capability}",
        "block_m": block_m,
        "shape": shape,
        "block_n": config.block_n,
        "registers": code.registers,
        "spills": code.spills,
        "shared": code.shared,
        "mma": code.tensor_instructions(),
        "instructions/weight": round(code.loop_instructions() / weights, 2),
    }
