"""Kernels compiled for a GPU that need not be there, and what their machine code holds."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loftq_kernels.formats.format import get_format
from loftq_kernels.triton_kernels.codebooks import make_decoder
from loftq_kernels.triton_kernels.configs import Config, decode_registers
from loftq_kernels.triton_kernels.decode_linear import CHUNK, _decode_linear_kernel, wide

TARGETS = (80, 89, 90, 100)
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Machine:
    """What the cubin of one kernel needs, and the instructions of its main loop by opcode."""

    registers: int
    spills: int  # STL and LDL, anywhere in the kernel
    shared: int  # bytes
    loop: Counter

    def loop_instructions(self) -> int:
        return sum(self.loop.values()) - self.loop["NOP"]  # padding ahead of a label, not of every iteration's work

    def tensor_instructions(self) -> int:
        return sum(count for name, count in self.loop.items() if name in ("HMMA", "HGMMA", "UTCHMMA"))


def compile_decode_linear(
    format: str,
    config: Config,
    capability: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    group_size: int = 64,
    splits: int = 1,
    rank: int = 0,
    adapters: bool = False,
    bias: bool = False,
    even: bool = True,
) -> Any:
    """`decode_linear`'s kernel for arguments as its launcher passes them, with pointers and shapes aligned to 16."""
    fmt = get_format(format)
    config = config.for_group(group_size)
    decoder = make_decoder(tuple(fmt.codebook().tolist()), dtype, sums=fmt.affine)
    x = _POINTERS[dtype]
    optional = {
        "offset": "*fp16" if fmt.affine else None,
        "lora_A": x if rank else None,
        "lora_B": x if rank else None,
        "adapter_ids": "*i64" if adapters else None,
        "bias": x if bias else None,
        "workspace": "*fp32" if rank or splits > 1 else None,
        "counters": "*i32" if rank or splits > 1 else None,
    }
    constants = {
        **{name: None for name, kind in optional.items() if kind is None},
        **{"BITS": fmt.bits, "SETUP": decoder.setup, "ASM": decoder.asm, "TABLE": decoder.table},
        **{"PLANES": decoder.planes, "CONSTANTS": decoder.constants, "CONSTANT_ASM": decoder.constant_asm},
        **{"UNIT": decoder.unit, "CENTER": decoder.center, "GROUP": max(group_size, 0), "EVEN": even},
        "WIDE": wide(config, group_size, 64, torch.float16),
        **{"SPLITS": splits, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "TILES": config.tiles},
        **{"BLOCK_R": 16 if rank <= 16 else 32, "CHUNK": CHUNK},
    }
    kinds = {"x": x, "codes": "*u8", "scale": "*fp16", "codebook": "*fp32", "y": x, "scaling": "fp32"}
    kinds |= {name: kind for name, kind in optional.items() if kind is not None}
    names = _decode_linear_kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ("N", "K")]
    source = ASTSource(
        _decode_linear_kernel, signature, constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    registers = decode_registers(config, fmt.bits, affine=fmt.affine, adapters=rank > 0)
    options |= {} if registers is None else {"maxnreg": registers}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def machine_code(kernel: Any) -> Machine:
    """Read the cubin of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    instructions, loops = parse(text)
    names = Counter(opcode(line) for line in instructions)
    return Machine(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spills=names["STL"] + names["LDL"],
        shared=kernel.metadata.shared,
        loop=main_loop(instructions, loops),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def parse(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions of a disassembly, and the (first, last) of each backward branch."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction.group(1))
    loops = []
    for i, line in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_\w+)", line)
        if target and labels.get(target.group(1), i) < i:
            loops.append((labels[target.group(1)], i))
    return instructions, loops


def opcode(instruction: str) -> str:
    """HMMA of ``@!P0 HMMA.16816.F32 R0, ...``."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].partition(".")[0]


def main_loop(instructions: list[str], loops: list[tuple[int, int]]) -> Counter:
    """Opcodes of the longest innermost loop that multiplies: spins and the adapters' loops are shorter."""
    innermost = [
        loop
        for loop in loops
        if not any(other != loop and loop[0] <= other[0] <= other[1] <= loop[1] for other in loops)
    ]
    counts = [Counter(opcode(line) for line in instructions[first : last + 1]) for first, last in innermost]
    return max(counts, key=lambda count: (count["HMMA"] + count["HGMMA"] > 0, sum(count.values())), default=Counter())
