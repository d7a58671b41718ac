"""What `loftq-kernels check` computes: small problems, what is right for each, and how far a result may be from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import loftq_kernels as lk
from loftq_kernels import threads
from loftq_kernels.cli.check_rows import Finding, worst_of
from loftq_kernels.formats import get_format
from loftq_kernels.ops import budget, reference
from loftq_kernels.storage import packing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALING = 0.75
RANK = 9


def one_thread() -> AbstractContextManager[None]:
    """For what plain torch computes in small pieces: on a busy machine, threads that wait for each other in each piece
    make it ten times slower. The kernels themselves are tried with all threads."""
    return threads.own_threads(1)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same values on each machine, for each device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equal(named: dict[str, Tensor], expected: Sequence[Tensor]) -> Finding:
    """Results that must equal the expected ones in every bit: the ratio is 0 or infinite."""
    for (name, ours), theirs in zip(named.items(), expected, strict=True):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            what, wanted = ((t.dtype, tuple(t.shape)) for t in (ours, theirs))
            return Finding(math.inf, f"{name} is {what}, expected {wanted}")
        different = int((ours.cpu() != theirs.cpu()).sum())
        if different:
            return Finding(math.inf, f"{different} of {theirs.numel()} values of {name} differ from the reference")
    return Finding(0.0, "equal to the reference")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def group_name(group_size: int) -> str:
    return "whole rows" if group_size == -1 else f"groups of {group_size}"


@dataclass(frozen=True)
class Layer:
    """A packed weight [rows, columns] on a device, by the reference quantizer."""

    format: str
    group_size: int
    rows: int
    columns: int
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.format} {self.rows}x{self.columns} in {group_name(self.group_size)}"

    @cached_property
    @one_thread()
    def packed(self) -> lk.PackedTensor:
        dense = gaussian(self.rows, self.columns, seed=self.rows).to(self.device)
        return lk.quantize(dense, self.format, self.group_size, backend="reference")

    @cached_property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        return self.packed.codes, self.packed.scale, self.packed.offset, self.packed.codebook


@dataclass(frozen=True)
class Product:
    """A product with a layer: `qlora_linear`, its gradient of x (transposed), or with adapters that x's rows choose.

    adapters: how many there are to choose from; 0: one for all rows, or none where adapted is False.
    """

    layer: Layer
    rows: int
    dtype: torch.dtype
    adapted: bool
    biased: bool
    transposed: bool = False
    adapters: int = 0

    @property
    def label(self) -> str:
        extras = [f"{self.adapters} adapters"] * bool(self.adapters)
        extras += ["adapter"] * (self.adapted and not self.adapters) + ["bias"] * self.biased
        return ", ".join([f"{self.layer.label}, M={self.rows} {name_of(self.dtype)}", *extras])

    @cached_property
    def x(self) -> Tensor:
        columns = self.layer.rows if self.transposed else self.layer.columns
        return gaussian(self.rows, columns, seed=self.rows, dtype=self.dtype).to(self.layer.device)

    @cached_property
    def adapter(self) -> tuple[Tensor | None, Tensor | None]:
        """Float32 whatever x is, as models have them; B A is about as large as the weight."""
        if not self.adapted:
            return None, None
        leading = (self.adapters,) if self.adapters else ()
        lora_A = gaussian(*leading, RANK, self.layer.columns, seed=1)
        lora_B = gaussian(*leading, self.layer.rows, RANK, seed=2) / RANK**0.5
        return lora_A.to(self.layer.device), lora_B.to(self.layer.device)

    @cached_property
    def ids(self) -> Tensor:
        """Each adapter and none (-1) in turn."""
        return (torch.arange(self.rows) % (self.adapters + 1) - 1).to(self.layer.device)

    @cached_property
    def bias(self) -> Tensor | None:
        return gaussian(self.layer.rows, seed=3, dtype=self.dtype).to(self.layer.device) if self.biased else None

    def multiply(self, ops: Any, x: Tensor | None = None, **options) -> Tensor:
        """By the functions of ops, which all take the same arguments; options go to them."""
        x, layer = self.x if x is None else x, self.layer
        if self.transposed:
            sizes = layer.columns, layer.group_size
            return ops.qlora_linear_grad_input(x, *layer.stored, *sizes, *self.adapter, SCALING, **options)
        arguments = x, *layer.stored, layer.group_size, *self.adapter
        if self.adapters:
            return ops.qlora_linear_multi(*arguments, self.ids, SCALING, self.bias, **options)
        return ops.qlora_linear(*arguments, SCALING, self.bias, **options)

    @cached_property
    @one_thread()
    def exact(self) -> Tensor:
        return self.multiply(reference, self.x.double())

    @cached_property
    @one_thread()
    def plain_error(self) -> float:
        return (self.multiply(reference).double() - self.exact).norm().item()

    @one_thread()
    def judge(self, y: Tensor, factor: float, allowance: float = 0.0) -> Finding:
        """The error of y over factor times plain torch's, with an allowance relative to the norm of the result."""
        if y.dtype != self.dtype or y.shape != self.exact.shape:
            return Finding(math.inf, f"{y.dtype} {tuple(y.shape)}, expected {self.dtype} {tuple(self.exact.shape)}")
        size, error = self.exact.norm().item(), (y.double() - self.exact).norm().item()
        said = f"relative error {error / size:.3g}, plain torch's {self.plain_error / size:.3g}"
        return Finding(error / (factor * self.plain_error + allowance * size), said)


def awkward(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Gaussian rows among rows of zeros, a constant, negative values, exact ties, and one of a larger magnitude."""
    weight = gaussian(rows, columns, seed=rows + columns)
    weight[1], weight[2], weight[3] = 0.0, 0.3, -weight[0].abs() - 1
    weight[4] = (torch.arange(columns) % 33 - 16) / 16
    weight[5] *= 100
    return weight.to(dtype)


@dataclass(frozen=True)
class Quantization:
    """An awkward weight that is quantized, alone or (residual) less a low-rank term that the op overwrites."""

    format: str
    group_size: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    search: bool
    residual: bool = False
    rows: int = 13
    columns: int = 330

    @property
    def label(self) -> str:
        kinds = f"{name_of(self.dtype)}, scales {name_of(self.scale_dtype)}"
        return f"{self.format} {self.rows}x{self.columns} in {group_name(self.group_size)}, {kinds}" + (
            ", searched" if self.search else ""
        )

    def run(self, ops: Any, device: str = "cpu") -> dict[str, Tensor]:
        fmt = get_format(self.format)
        weight = awkward(self.rows, self.columns, self.dtype).to(device)
        options = fmt.codebook(device), self.group_size, fmt.scale_rule, self.scale_dtype, self.search
        if not self.residual:
            return dict(zip(("codes", "scale", "offset"), ops.quantize(weight, *options), strict=True))
        low_rank = gaussian(self.rows, self.columns, seed=4).to(device)
        results = ops.quantize_residual_(weight, low_rank, *options)
        return dict(zip(("codes", "scale", "offset", "norm"), results, strict=True)) | {"low_rank": low_rank}

    @cached_property
    @one_thread()
    def expected(self) -> dict[str, Tensor]:
        return self.run(reference)

    def judge(self, results: dict[str, Tensor]) -> Finding:
        """The norm of a residual is a float64 sum in any order: only that may differ, in its last bits."""
        expected, results = dict(self.expected), dict(results)
        if self.residual:
            ours, theirs = results.pop("norm").item(), expected.pop("norm").item()
            if not abs(ours - theirs) <= 1e-12 * theirs:
                return Finding(math.inf, f"the residual's norm is {ours!r}, expected {theirs!r}")
        return equal(results, list(expected.values()))


@dataclass(frozen=True)
class Initialization:
    """LoftQ of a weight by the driver in use, against the driver in plain torch."""

    format: str
    rows: int
    columns: int
    rank: int = 8
    num_iter: int = 3

    @property
    def label(self) -> str:
        return f"{self.format} {self.rows}x{self.columns}, rank {self.rank}"

    @cached_property
    def weight(self) -> Tensor:
        return gaussian(self.rows, self.columns, seed=3)

    def run(self, device: str, backend: str | None = None) -> lk.AdapterInit:
        return lk.loftq_init(self.weight.to(device), self.format, self.rank, self.num_iter, backend=backend)

    @cached_property
    @one_thread()
    def expected(self) -> lk.AdapterInit:
        return self.run("cpu", "reference")

    @one_thread()
    def judge(self, init: lk.AdapterInit) -> Finding:
        """The error after each alternation, and what the returned tensors leave of the weight."""
        dense = init.packed.dequantize(torch.float64, backend="reference").cpu()
        dense = dense + init.scaling * init.lora_B.double().cpu() @ init.lora_A.double().cpu()
        actual = ((self.weight.double() - dense).norm() / self.weight.double().norm()).item()
        if len(init.errors) != len(self.expected.errors):
            return Finding(math.inf, f"{len(init.errors)} alternations, expected {len(self.expected.errors)}")
        ratios = [
            _relative(ours, theirs) / budget.DRIVERS
            for ours, theirs in zip(init.errors, self.expected.errors, strict=True)
        ]
        said = f"weight error {actual:.5g}, stated {init.error:.5g}, of plain torch {self.expected.error:.5g}"
        return Finding(worst_of([*ratios, _relative(init.error, actual) / budget.STATED_ERROR]), said)


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / theirs


def unpacking(bits: int, ops: Any, device: str) -> Finding:
    codes = torch.randint(0, 2**bits, (13, 330), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    expected = packing.pack_codes(codes, bits)
    packed = ops.pack_codes(codes.to(device), bits)
    unpacked = ops.unpack_codes(expected.to(device), bits, codes.shape[1])
    return equal({"packed bytes": packed, "codes": unpacked}, [expected, codes])


def dequantizing(layer: Layer, dtype: torch.dtype, ops: Any) -> Finding:
    arguments = *layer.stored, layer.columns, layer.group_size, dtype
    with one_thread():
        expected = reference.dequantize(*arguments)
    return equal({"the weight": ops.dequantize(*arguments)}, [expected])


def decomposing(name: str, size: int, dtype: torch.dtype, device: str) -> Finding:
    """A small-matrix op by the properties of its results: orthonormal vectors that put the matrix together again."""
    tall = gaussian(3, 2 * size + 60, size, seed=size, dtype=torch.float64)
    matrix = (tall if name == "jacobi_svd" else tall.mT @ tall).to(dtype)
    *results, info = (out.cpu() for out in getattr(torch.ops.loftq_kernels, name)(matrix.to(device)))
    if bool((info != 0).any()):
        return Finding(math.inf, f"info is {info.tolist()}, expected zeros")
    results = [out.double() for out in results]
    if name == "cholesky_inverse_factor":  # gram = R^T R: the columns of tall R^-1 are orthonormal
        q, error, dtype = tall @ results[0], torch.zeros(()), torch.float32
    elif name == "jacobi_eigh":
        values, q = results
        error = (matrix.double() @ q - q * values.unsqueeze(-2)).abs().amax() / values.amax()
    else:
        u, values, q = results
        error = (matrix.double() - (u * values.unsqueeze(-2)) @ q.mT).abs().amax() / values.amax()
    apart = (q.mT @ q - torch.eye(size, dtype=torch.float64)).abs().amax()
    limit = budget.of_decomposition(size, dtype)
    said = f"off by {error.item():.3g}, not orthonormal by {apart.item():.3g}, limit {limit:.3g}"
    return Finding(worst_of([error.item() / limit, apart.item() / limit]), said)


def spread(formats: Sequence[str], group_sizes: Sequence[int]) -> Iterator[tuple[int, str, int]]:
    """Each format with each group size, numbered so that `number % n`, small n, takes all its values for either."""
    for i, format_name in enumerate(formats):
        for j, group_size in enumerate(group_sizes):
            yield i + j, format_name, group_size
