"""Run as a script in which `loftq_kernels` cannot be imported: cases of a copy of triton_kernels/ in another package.

    python vendored.py FOLDER MODULE [beside]

FOLDER holds the package, MODULE is the copy's dotted name. Prints a JSON object of relative errors against float64, of
the copy and of plain torch. With "beside" the original is imported, too, and gives the same bits.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import sys

import interpreter
import numpy as np
import torch
from oracle import codebook, decode_codes
from torch import Tensor

WIDTHS = torch.float64, torch.float32


class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "loftq_kernels":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


class Weight:
    """A random packed weight [N, K] with groups of 32 and offsets, and what it is in float64."""

    def __init__(self, format: str, rows: int, columns: int, generator: torch.Generator):
        book = torch.from_numpy(codebook(format))
        self.bits = len(book).bit_length() - 1
        size, groups = -(-columns // 64) * 8 * self.bits, -(-columns // 32)
        codes = torch.randint(256, (rows, size), dtype=torch.uint8, generator=generator)
        scale = (torch.rand(rows, groups, generator=generator) + 0.5).half() / len(book) ** 0.5
        offset = torch.randn(rows, groups, generator=generator).half() / 4
        self.stored = codes, scale, offset, book
        values = book.double()[torch.from_numpy(decode_codes(codes, columns, self.bits).astype(np.int64))]
        spread = [t.double().repeat_interleave(32, 1)[:, :columns] for t in (scale, offset)]
        self.dense = values * spread[0] + spread[1]


def _by_row(x: Tensor, dense: Tensor, A: Tensor, B: Tensor, ids: Tensor) -> Tensor:
    """Plain torch, row by row, at scaling 0.5."""
    adapters = [0.5 * (i >= 0) * (B[i] @ (A[i] @ row)) for i, row in zip(ids.tolist(), x, strict=True)]
    return x @ dense.T + torch.stack(adapters)


def results(functional) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each case what the kernels give, the float64 reference, and plain torch in the case's dtype."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    cases = {}
    for name, format, rows, dtype in (
        ("decode", "nf4", 3, torch.float16),
        ("decode in bfloat16", "int2", 1, torch.bfloat16),
        ("prefill", "nf2", 37, torch.float16),
        ("chunked", "int8", 20, torch.float32),
    ):
        weight = Weight(format, 70, 200, generator)
        x, bias = normal(rows, 200, dtype=dtype).requires_grad_(), normal(70, dtype=torch.float32)
        lora_A, lora_B = normal(5, 200, dtype=torch.float32) / 14, normal(70, 5, dtype=torch.float32)
        leaves = x, lora_A.requires_grad_(), lora_B.requires_grad_()
        y = functional.qlora_linear(x, *weight.stored, 32, lora_A, lora_B, None, 0.5, bias)
        grad = normal(rows, 70, dtype=dtype)
        ours = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
        both = []
        for kind in (torch.float64, dtype):
            copies = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
            plain = copies[0] @ weight.dense.to(kind).T + 0.5 * (copies[0] @ copies[1].T) @ copies[2].T + bias.to(kind)
            both.append([plain.detach(), *torch.autograd.grad(plain, copies, grad.to(kind))])
        for part, *values in zip(("y", "grad x", "grad A", "grad B"), ours, *both, strict=True):
            cases[f"{name}: {part}"] = tuple(values)
    weight = Weight("int4", 9, 130, generator)
    dense = functional.dequantize(*weight.stored, 130, 32, torch.bfloat16)
    cases["dequantize"] = dense, weight.dense, weight.dense.bfloat16()
    ids, x = torch.tensor([1, -1, 0, 1]), normal(4, 130, dtype=torch.float32)
    A, B = normal(2, 3, 130, dtype=torch.float32), normal(2, 9, 3, dtype=torch.float32)
    y = functional.qlora_linear(x, *weight.stored, 32, A, B, ids, 0.5)
    exact, plain = (_by_row(x.to(kind), weight.dense.to(kind), A.to(kind), B.to(kind), ids) for kind in WIDTHS)
    cases["adapters by row"] = y, exact, plain
    return cases


if __name__ == "__main__":
    interpreter.repair()
    folder, module, *beside = sys.argv[1:]
    sys.path.insert(0, folder)
    if not beside:
        sys.meta_path.insert(0, Block())
    copy = importlib.import_module(f"{module}.functional")
    assert copy.__file__.startswith(folder)
    found = results(copy)
    if beside:
        from loftq_kernels.triton_kernels import autotune, functional

        theirs = importlib.import_module(f"{module}.autotune")
        assert theirs.Cache is not autotune.Cache and theirs.folder() != autotune.folder()
        original = results(functional)
        assert all(torch.equal(found[name][0], original[name][0]) for name in found)
    errors = {}
    for name, (ours, exact, plain) in found.items():
        assert ours.shape == exact.shape, name
        norm = exact.norm()
        errors[name] = [((value.double() - exact).norm() / norm).item() for value in (ours, plain)]
    print(json.dumps(errors))
