"""What the Triton launchers would run, compiled for a GPU that need not be there, and its instructions counted."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHARED_LIMITS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block, CUDA's guide
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Cubin:
    instructions: Counter  # of SASS, by name up to the first point
    shared: int  # bytes

    @property
    def spills(self) -> int:
        return self.instructions["STL"] + self.instructions["LDL"]

    @property
    def tensor_core(self) -> int:
        return sum(self.instructions[name] for name in ("HMMA", "HGMMA", "UTCHMMA"))


@contextmanager
def captured_launches():
    """A list that launches within are added to, as (kernel, arguments, options), instead of being run."""
    launches, run = [], JITFunction.run

    def capture(self, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        launches.append((self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, options))

    JITFunction.run = capture
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(kernel: JITFunction, arguments: dict, options: dict, architecture: int) -> Cubin:
    """The cubin that the launch would compile on a device of that architecture."""
    signature, constexprs, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and type(value) is int and value == 1):
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if specialized and isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, re.MULTILINE)
    return Cubin(Counter(names), compiled.metadata.shared)
