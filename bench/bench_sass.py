"""What ptxas makes of every shipped kernel configuration: registers, spills, shared memory, instructions a weight.

Needs no GPU. Decode on an H200 at its full bandwidth leaves 4.1 issue slots a weight at 4 bits and 2.2 at 2 bits.
"""

from __future__ import annotations

from pathlib import Path

import triton

from bench import harness
from bench.sass import TARGETS, compile_decode_linear, machine_code
from loftq_kernels.triton_kernels.configs import TABLE, Key, rows_of_table

FORMATS = ("nf2", "int2", "int2_sym", "nf4", "int4", "int4_sym", "uniform4", "int8")
BITS = {"nf2": 2, "int2": 2, "int2_sym": 2, "int8": 8, "int8_sym": 8}  # others: 4


def run(output: Path, *, quick: bool) -> None:
    rows = []
    for capability in (90,) if quick else TARGETS:
        rows += [_row(format, key) for format in FORMATS for key in decode_keys(format, capability)]
    harness.print_table(rows)
    harness.write_json(output / "sass.json", {"triton": triton.__version__, "group_size": 64, "kernels": rows})


def decode_keys(format: str, capability: int) -> list[Key]:
    """What `decode_linear` has configurations for, as a device of that capability asks for them."""
    places = {(key.rows, key.shape) for key in TABLE if key.kernel == "decode"}
    return [Key("decode", capability, BITS.get(format, 4), rows, shape) for rows, shape in sorted(places)]


def _row(format: str, key: Key) -> dict:
    config = rows_of_table(key)[0]
    code = machine_code(compile_decode_linear(format, config, key.architecture))
    weights = config.block_n * config.block_k / (32 * config.num_warps)  # a thread, an iteration
    return {
        "kernel": "decode_linear",
        "format": format,
        "target": f"sm_{key.architecture}",
        "block_m": config.block_m,
        "shape": key.shape,
        "block_n": config.block_n,
        "registers": code.registers,
        "spills": code.spills,
        "shared": code.shared,
        "mma": code.tensor_instructions(),
        "instructions/weight": round(code.loop_instructions() / weights, 2),
    }
