"""What ptxas makes of every shipped kernel configuration: registers, spills, shared memory, instructions per weight.

It needs no GPU. At its full bandwidth an H200 leaves decode 4.1 issue slots per weight at 4 bits and 2.2 at 2 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import triton

from bench import harness
from bench.sass import TARGETS, Case, Launch, launches, machine_code
from bench.subject import Subject
from loftq_kernels.formats import get_format
from loftq_kernels.triton_kernels.configs import TABLE, Key, rows_of_table

SUBJECT = Subject(takes="4 min", quick="1 min", needs=("triton",), options=("formats",))
FORMATS = ("nf2", "int2", "int2_sym", "nf4", "int4", "int4_sym", "uniform4", "int8")
TILE_FORMATS = ("nf2", "nf4", "int4", "int8")  # For large tiles, which scale weights the same way in all formats.


def run(output: Path, *, quick: bool, formats: Sequence[str] | None = None) -> None:
    """The file is written after each target: a run takes minutes."""
    path = harness.result_file(output, "sass", quick=quick)
    rows: list[dict] = []
    for capability in (90,) if quick else TARGETS:
        wanted = [pair for pair in cases(capability) if formats is None or pair[0].format in formats]
        for case, shape in harness.progress(wanted, lambda pair, sm=capability: f"sm_{sm}: {_described(*pair)}"):
            rows += [_row(case, shape, launch, capability) for launch in launches(case)]
        results = {"triton": triton.__version__, "group_size": 64, "spread": harness.NO_TIMES, "kernels": rows}
        harness.write_json(path, results)
    harness.print_table(rows)


def _described(case: Case, shape: str | None) -> str:
    block = "" if case.config is None else f", blocks of {case.config.block_m} x {case.config.block_n}"
    return f"{case.kernel} {case.format}{block}{'' if shape is None else f', {shape}'}"


def cases(capability: int) -> Iterator[tuple[Case, str | None]]:
    """Every configuration that a device of that capability may be given, with the class of shapes it is for."""
    for format in FORMATS:
        for key in decode_keys(format, capability):
            yield Case("decode", format, rows_of_table(key)[0]), key.shape
    for kernel in ("prefill", "grad_input"):
        for format in TILE_FORMATS:
            for config in rows_of_table(Key(kernel, capability, get_format(format).bits, 512, "tall")):
                yield Case(kernel, format, config), None
    for format in TILE_FORMATS:
        yield Case("dequantize", format), None
    yield Case("lora"), None


def decode_keys(format: str, capability: int) -> list[Key]:
    """The keys of decode's configurations, as a device of that capability asks for them."""
    places = {(key.rows, key.shape) for key in TABLE if key.kernel == "decode"}
    return [Key("decode", capability, get_format(format).bits, rows, shape) for rows, shape in sorted(places)]


def _row(case: Case, shape: str | None, launch: Launch, capability: int) -> dict:
    code, config = machine_code(launch, capability), case.config
    weights = case.weights_per_thread()
    return {
        "kernel": launch.name,
        "format": case.format if case.kernel != "lora" else None,
        "target": f"sm_{capability}",
        "block_m": config and config.block_m,
        "shape": shape,
        "block_n": config and config.block_n,
        "registers": code.registers,
        "spills": code.spills,
        "shared": code.shared,
        "mma": code.tensor_instructions(),
        "instructions/weight": weights and round(code.loop_instructions() / weights, 2),
    }
