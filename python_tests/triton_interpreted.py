"""Run as a script: cases of the Triton kernels under TRITON_INTERPRET=1, which has to be set before Triton is imported.

Reads a JSON list of cases from standard input, prints a JSON list of results (see `decode_linear_case`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import interpreter
import torch
from torch import Tensor

import loftq_kernels as lk


def decode_linear_case(
    device: str,
    *,
    format: str,
    M: int,
    N: int,
    K: int,
    group_size: int = 64,
    dtype: str = "float32",
    scale_dtype: str = "float16",
    rank: int = 0,
    adapters: int = 0,
    bias: bool = False,
    block_n: int = 32,
    tiles: int = 1,
    splits: int | None = None,
    seed: int = 0,
    adapter_dtypes: tuple[str, str] | None = None,
) -> dict[str, float]:
    """Relative errors against float64: of the kernel, and of plain torch in the same dtype.

    adapters: how many there are to choose from, by random ids with -1 among them; 0: one for all rows.
    adapter_dtypes: of lora_A and lora_B; None: that of x.
    """
    from loftq_kernels.triton_kernels.configs import Config
    from loftq_kernels.triton_kernels.decode_launch import decode_linear

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kind = getattr(torch, dtype)
    packed = lk.quantize(normal(N, K), format, group_size, scale_dtype=getattr(torch, scale_dtype), backend="reference")
    x = normal(M, K).to(kind).to(device)
    lora_A = lora_B = ids = None
    if rank:
        kinds = [getattr(torch, name) for name in adapter_dtypes or (dtype, dtype)]
        lora_A = (normal(max(adapters, 1), rank, K) / K**0.5).to(kinds[0]).to(device)
        lora_B = normal(max(adapters, 1), N, rank).to(kinds[1]).to(device)
        if adapters:
            ids = torch.randint(-1, adapters, (M,), generator=generator).to(device)
    bias_values = normal(N).to(kind).to(device) if bias else None
    tensors = [
        None if t is None else t.to(device) for t in (packed.codes, packed.scale, packed.offset, packed.codebook)
    ]
    y = decode_linear(
        x,
        *tensors,
        group_size,
        lora_A if ids is not None or lora_A is None else lora_A[0],
        lora_B if ids is not None or lora_B is None else lora_B[0],
        ids,
        0.5,
        bias_values,
        config=Config(8 if M <= 8 else 16, block_n, 64 * tiles, 2, 2, 4),
        splits=splits,
    )
    exact, plain = (
        _expected(x, packed.to(device), lora_A, lora_B, ids, bias_values, precision)
        for precision in (torch.float64, kind)
    )
    assert y.dtype == kind and y.shape == (M, N)
    norm = exact.norm().clamp(min=1e-30)
    return {"error": ((y.double() - exact).norm() / norm).item(), "plain": ((plain - exact).norm() / norm).item()}


def _expected(x, packed, lora_A, lora_B, ids, bias, precision) -> Tensor:
    """The equation in plain torch, all of it at one precision; float64 out."""
    y = x.to(precision) @ packed.dequantize(precision, backend="reference").T
    if lora_A is not None:
        ids = torch.zeros(len(x), dtype=torch.int64, device=x.device) if ids is None else ids
        for row, adapter in enumerate(ids.tolist()):
            if adapter >= 0:
                down = lora_A[adapter].to(precision) @ x[row].to(precision)
                y[row] += 0.5 * (lora_B[adapter].to(precision) @ down)
    return (y if bias is None else y + bias.to(precision)).double()


@contextmanager
def grid_reversed() -> Iterator[None]:
    """The interpreter runs programs one by one, here from the last to the first: none may wait for a later one."""
    from triton.runtime.interpreter import InterpreterBuilder

    builder, set_index = InterpreterBuilder, InterpreterBuilder.set_grid_idx
    builder.set_grid_idx = lambda self, *at: set_index(
        self, *(count - 1 - i for count, i in zip(self.grid_dim, at, strict=True))
    )
    try:
        yield
    finally:
        builder.set_grid_idx = set_index


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    interpreter.repair()
    results = []
    for case in json.load(sys.stdin):
        with grid_reversed() if case.pop("reversed", False) else nullcontext():
            results.append(decode_linear_case("cpu", **case))
    print(json.dumps(results))
