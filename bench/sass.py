"""The kernels of a launch, compiled for a GPU that need not be there, and what their machine code holds."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from loftq_kernels.formats import empty_packed
from loftq_kernels.formats.format import get_format
from loftq_kernels.triton_kernels.codebooks import codebook_values
from loftq_kernels.triton_kernels.configs import TILE, Config
from loftq_kernels.triton_kernels.decode_launch import decode_linear
from loftq_kernels.triton_kernels.dequantize import launch_dequantize
from loftq_kernels.triton_kernels.device import DEVICES
from loftq_kernels.triton_kernels.grad_input import launch_grad_input
from loftq_kernels.triton_kernels.lora import launch_lora_down, launch_lora_up
from loftq_kernels.triton_kernels.prefill_linear import launch_prefill_linear
from loftq_kernels.triton_kernels.tiles import tile_decoder

TARGETS = (80, 89, 90, 100)
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # Opcodes; on 90 and 100 those of whole tiles.
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# ---- what would be launched


class Launch(NamedTuple):
    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removeprefix("_").removesuffix("_kernel")


@contextmanager
def captured_launches() -> Iterator[list[Launch]]:
    """A list to which launches within are added instead of being run."""
    launches: list[Launch] = []
    run = JITFunction.run

    def capture(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(kernel, grid, arguments, keywords))

    JITFunction.run = capture
    try:
        yield launches
    finally:
        JITFunction.run = run


@dataclass(frozen=True)
class Case:
    """A call of a launcher."""

    kernel: str  # decode, prefill, grad_input, dequantize or lora
    format: str = "nf4"
    config: Config | None = None
    group_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    out_features: int = 4096
    in_features: int = 4096
    rank: int = 16
    extras: bool = False  # All options: adapters (chosen by row, where a launcher can), bias, splits of K.
    adapter_dtype: torch.dtype | None = None  # None: the dtype of x.

    def weights_per_thread(self) -> float | None:
        """Weights that a thread decodes per iteration of the main loop, or None for a kernel without such a loop."""
        if self.config is None:
            return None
        config, step = self.config, self.config.block_k
        if self.kernel == "decode":
            step = config.for_group(self.group_size).block_k
        elif self.kernel == "prefill" and get_format(self.format).bits == 8:
            step = TILE // 2  # So that no iteration has two groups of 32.
        return config.block_n * step / (32 * config.num_warps)


def launches(case: Case) -> list[Launch]:
    """The launches of a case. Launchers look at nothing but shapes, dtypes, strides and the code book."""
    rows = case.config.block_m if case.kernel == "decode" else 512
    codebook = get_format(case.format).codebook()
    n, k, rank = case.out_features, case.in_features, case.rank
    packed = empty_packed(n, k, case.format, case.group_size, device="meta")
    weight = packed.codes, packed.scale, packed.offset, codebook, case.group_size

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y, h = empty(rows, k), empty(rows, n), empty(rows, rank)
    ids, bias = empty(rows, dtype=torch.int64), empty(n) if case.extras else None
    lora_A, lora_B = (empty(1, *shape, dtype=case.adapter_dtype or case.dtype) for shape in ((rank, k), (n, rank)))
    with captured_launches() as captured:
        if case.kernel == "decode":
            adapters = (lora_A, lora_B, ids, 0.5, bias) if case.extras else ()
            splits = 2 if case.extras else 1
            decode_linear(x, *weight, *adapters, config=case.config, splits=splits, device=DEVICES[90])
        elif case.kernel == "prefill":
            adapters = (h, lora_B, ids) if case.extras else (None, None, None)
            splits = 2 if case.extras and case.config.fill else 1
            decoder = tile_decoder(codebook_values(codebook), case.dtype, True, along=True)
            launch_prefill_linear(x, *weight, decoder, *adapters, bias, y, case.config, splits)
        elif case.kernel == "grad_input":
            adapter = (h, lora_A[0]) if case.extras else (None, None)
            decoder = tile_decoder(codebook_values(codebook), case.dtype, True, along=False)
            launch_grad_input(y, *weight, decoder, *adapter, x, case.config)
        elif case.kernel == "dequantize":
            launch_dequantize(*weight, empty(n, k))
        else:
            adapters = ids if case.extras else None
            launch_lora_down(x, lora_A, adapters, 0.5, multiprocessors=132)
            launch_lora_up(y, h, lora_B, adapters)
    return captured


# ---- what it is compiled to


@dataclass(frozen=True)
class Machine:
    """What the cubin of one kernel needs, and the instructions of its main loop by opcode."""

    registers: int
    spills: int  # STL and LDL instructions, anywhere in the kernel
    shared: int  # bytes
    loop: Counter

    def loop_instructions(self) -> int:
        return sum(self.loop.values()) - self.loop["NOP"]  # NOPs pad the code ahead of a label.

    def tensor_instructions(self) -> int:
        return _tensor_instructions(self.loop)


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel as Triton would compile it for the launch on a device: Triton's own binder specializes it."""
    kernel, target = launch.kernel, GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.keywords, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def machine_code(launch: Launch, capability: int) -> Machine:
    """Compile a launch for a device of that capability, and read the cubin."""
    kernel = compiled(launch, capability)
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
    """The instructions of a disassembly, and the (first, last) of each loop."""
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
        first = labels.get(target.group(1), i) if target else i
        # ptxas puts waiting code behind the kernel's end: its branch back over that end makes no loop.
        if first < i and not any(between.startswith("EXIT") for between in instructions[first:i]):
            loops.append((first, i))
    return instructions, loops


def opcode(instruction: str) -> str:
    """HMMA of ``@!P0 HMMA.16816.F32 R0, ...``."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].partition(".")[0]


def _tensor_instructions(opcodes: Counter) -> int:
    return sum(opcodes[name] for name in set(TENSOR_CORES.values()))


def main_loop(instructions: list[str], loops: list[tuple[int, int]]) -> Counter:
    """Opcodes of the longest innermost loop, among loops with tensor-core instructions if there are any.

    Loops that wait, which may be within it, and the loops of adapters are shorter.
    """
    counts = {loop: Counter(opcode(line) for line in instructions[loop[0] : loop[1] + 1]) for loop in loops}
    counts = {loop: count for loop, count in counts.items() if _tensor_instructions(count)} or counts
    innermost = [
        count
        for (first, last), count in counts.items()
        if not any(other != (first, last) and first <= other[0] <= other[1] <= last for other in counts)
    ]
    return max(innermost, key=lambda count: sum(count.values()), default=Counter())
