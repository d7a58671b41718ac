"""The kernel paths of this machine, each with its cases."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from loftq_kernels.cli.check_cases import (
    DTYPES,
    Initialization,
    Layer,
    Product,
    Quantization,
    decomposing,
    dequantizing,
    name_of,
    spread,
    unpacking,
)
from loftq_kernels.cli.check_rows import Case, Finding, KernelPath
from loftq_kernels.formats import get_format
from loftq_kernels.ops import budget, extension, triton_backend, triton_routes
from loftq_kernels.storage.packing import BITS, GROUP_SIZES
from loftq_kernels.triton_kernels.codebooks import affine_map

OPS = torch.ops.loftq_kernels
ROWS = (1, 2, 5, 17, 129)
WIDE = 5200  # 54 MB in bfloat16: on every device the chunked paths take a square weight in more than one chunk
ISA_VARIABLE = "LOFTQ_CPU_ISA"


def paths_of_machine(formats: Sequence[str]) -> Iterator[KernelPath]:
    """Every path of every device: those that are not here say why."""
    yield from cpu_paths(formats)
    if not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no CUDA device"
        yield KernelPath("CUDA", "all kernels", missing=lambda: reason)
        return
    for index in range(torch.cuda.device_count()):
        yield from cuda_paths(f"cuda:{index}", formats)
        yield from triton_paths(f"cuda:{index}", formats)


# CPU


def cpu_paths(formats: Sequence[str]) -> Iterator[KernelPath]:
    if extension.library is None:
        reason = f"the extension did not load ({extension.LOAD_ERROR}); {extension.HOW_TO_BUILD}"
        yield KernelPath("CPU", "all kernels", missing=lambda: reason)
        return
    yield KernelPath("CPU", "pack, unpack", _pack_cases("cpu"))
    problems = _CpuProblems.of(formats)
    for isa in extension.library.cpu_isas():
        yield from _paths_of_isa(isa, problems)


@dataclass(frozen=True)
class _CpuProblems:
    """What every instruction set is given; what is right is computed once for all of them."""

    quantizations: list[Quantization]
    residuals: list[Quantization]
    layers: list[tuple[Layer, torch.dtype]]
    products: list[Product]
    gradients: list[Product]
    initializations: list[Initialization]

    @classmethod
    def of(cls, formats: Sequence[str]) -> _CpuProblems:
        return cls(
            _quantizations(formats),
            _quantizations(formats, residual=True),
            _dequantizations(formats, "cpu"),
            _cpu_products(formats),
            _cpu_products(formats, transposed=True),
            _initializations(formats),
        )


def _paths_of_isa(isa: str, problems: _CpuProblems) -> Iterator[KernelPath]:
    factor = budget.of_products(isa)
    cases = {
        "quantize": _quantize_cases(problems.quantizations, "cpu"),
        "quantize_residual_": _quantize_cases(problems.residuals, "cpu"),
        "dequantize": _dequantize_cases(problems.layers, OPS),
        "qlora_linear": _product_cases(problems.products, OPS, factor),
        "qlora_linear_grad_input": _product_cases(problems.gradients, OPS, factor),
        "LoftQ initializer": _initializer_cases(problems.initializations, "cpu"),
    }
    for name, own in cases.items():
        yield KernelPath(f"CPU {isa}", name, own, setting=partial(forced_isa, isa))


@contextlib.contextmanager
def forced_isa(isa: str) -> Iterator[None]:
    """The kernels read the variable at each call."""
    before = os.environ.get(ISA_VARIABLE)
    os.environ[ISA_VARIABLE] = isa
    try:
        used = extension.library.cpu_isa()
        if used != isa:
            raise RuntimeError(f"{ISA_VARIABLE}={isa} gives the instruction set {used}")
        yield
    finally:
        if before is None:
            del os.environ[ISA_VARIABLE]
        else:
            os.environ[ISA_VARIABLE] = before


def _cpu_products(formats: Sequence[str], transposed: bool = False) -> list[Product]:
    """Odd sizes, no multiple of a tile or group. Few rows of x get many columns of results: the error of a few dozen
    numbers is a matter of luck."""
    products = []
    for number, format_name, group_size in spread(formats, GROUP_SIZES):
        wide, narrow = (Layer(format_name, group_size, *_sides(n, 330, transposed)) for n in (1031, 131))
        for j, rows in enumerate(ROWS):
            dtype = DTYPES[(number + j) % len(DTYPES)]
            adapted, biased = bool((number + j) & 1), bool((number + j) & 2) and not transposed
            products.append(Product(wide if rows <= 5 else narrow, rows, dtype, adapted, biased, transposed))
    return products


def _sides(results: int, summed: int, transposed: bool) -> tuple[int, int]:
    return (summed, results) if transposed else (results, summed)


# CUDA kernels of the extension


def cuda_paths(device: str, formats: Sequence[str]) -> Iterator[KernelPath]:
    cases = {
        "quantize": _quantize_cases(_quantizations(formats), device),
        "quantize_residual_": _quantize_cases(_quantizations(formats, residual=True), device),
        "dequantize": _dequantize_cases(_dequantizations(formats, device), OPS),
        "pack_codes": _pack_cases(device),
        "jacobi_eigh": _decomposition_cases("jacobi_eigh", device),
        "jacobi_svd": _decomposition_cases("jacobi_svd", device),
        "cholesky_inverse_factor": _decomposition_cases("cholesky_inverse_factor", device),
    }
    for op, own in cases.items():
        name = "pack, unpack" if op == "pack_codes" else op
        yield KernelPath(device, name, own, missing=partial(_no_cuda_kernel, op))
    initializer = _initializer_cases(_initializations(formats), device)
    yield KernelPath(device, "LoftQ initializer", initializer, missing=partial(_no_cuda_kernel, "quantize"))


def _no_cuda_kernel(op: str) -> str | None:
    if extension.library is None:
        return f"the extension did not load ({extension.LOAD_ERROR}); {extension.HOW_TO_BUILD}"
    if not extension.library.build_info()["cuda"]:
        return "the extension was built without CUDA, plain torch serves; build it where torch and nvcc have CUDA"
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"loftq_kernels::{op}", "CUDA")
    return None if has else "the extension has no CUDA kernel of it"


# Triton


def triton_paths(
    device: str, formats: Sequence[str], results: int = 1031, summed: int = 330, wide: int = WIDE
) -> Iterator[KernelPath]:
    """Each kernel by name, whatever `triton_kernels.paths` would choose for a shape.

    Triton compiles a kernel in about a second for each code book, dtype and group size: no path tries all of them with
    each other, and those that share their decoding share its cases.
    """
    books, offsets = _one_per_decoding(formats), _one_per_decoding(formats, offsets=True)
    half, sides = DTYPES[1:], (results, summed)
    forward = partial(_triton_products, device, sides=sides)
    backward = partial(_triton_products, device, sides=sides[::-1], transposed=True)
    several = partial(_several_adapters, Layer(books[0], 64, *sides, device))
    cases = {
        "decode": _triton_cases(forward(offsets, (1, 5, 16), DTYPES), "decode"),
        "prefill": _triton_cases(forward(books, (17, 129), half), "prefill"),
        "chunked": _triton_cases(forward(books[-1:], (17, 129), DTYPES, wide=wide), "chunked"),
        "backward fused": _triton_cases(backward(books, (17, 129), half), "fused"),
        "backward chunked": _triton_cases(backward(books[-1:], (17, 129), DTYPES, wide=wide), "chunked"),
        "multi decode": _triton_cases(several(9, DTYPES[:2]), "decode"),
        "multi prefill": _triton_cases(several(40, DTYPES[1:2]), "prefill"),
        "multi chunked": _triton_cases(several(40, DTYPES[:2]), "chunked"),
        "dequantize": _dequantize_cases(_triton_dequantizations(offsets, device, *sides), triton_backend),
    }
    for name, own in cases.items():
        yield KernelPath(
            device, f"Triton {name}", own, missing=partial(triton_routes.unavailable, torch.device(device))
        )


def _one_per_decoding(formats: Sequence[str], offsets: bool = False) -> list[str]:
    """The first format of each way to decode: by bits and arithmetic or table, also (offsets) with or without them."""
    first: dict[tuple, str] = {}
    for name in formats:
        fmt = get_format(name)
        arithmetic = affine_map(tuple(fmt.codebook().tolist())) is not None
        first.setdefault((fmt.bits, arithmetic, offsets and fmt.affine), name)
    return list(first.values())


def _triton_products(
    device: str,
    formats: Sequence[str],
    all_rows: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    sides: tuple[int, int],
    transposed: bool = False,
    wide: int | None = None,
) -> list[Product]:
    """Each format once, with dtypes, group sizes, rows and adapters in turn; then the first one in the other dtypes."""
    products = []
    for i, format_name in enumerate([*formats, *formats[:1] * (len(dtypes) - 1)]):
        dtype = dtypes[i % len(dtypes)] if i < len(formats) else dtypes[i - len(formats) + 1]
        layer = Layer(format_name, GROUP_SIZES[(i + 1) % len(GROUP_SIZES)], *sides, device)
        rows = all_rows[i // 2 % len(all_rows)]
        products.append(Product(layer, rows, dtype, bool(i & 1), bool(i & 2) and not transposed, transposed))
    if wide is not None:
        layer = Layer(formats[0], 64, wide, wide, device)
        products.append(Product(layer, all_rows[0], torch.bfloat16, True, not transposed, transposed))
    return products


def _several_adapters(layer: Layer, rows: int, dtypes: Sequence[torch.dtype]) -> list[Product]:
    return [Product(layer, rows, dtype, adapted=True, biased=True, adapters=3) for dtype in dtypes]


def _triton_dequantizations(
    formats: Sequence[str], device: str, rows: int, columns: int
) -> list[tuple[Layer, torch.dtype]]:
    return [
        (Layer(format_name, GROUP_SIZES[i % len(GROUP_SIZES)], rows, columns, device), DTYPES[i % len(DTYPES)])
        for i, format_name in enumerate(formats)
    ]


def _triton_cases(products: Sequence[Product], kernel: str) -> list[Case]:
    return [
        case
        for product in products
        for case in _product_cases(
            [product], triton_backend, budget.PRODUCT, budget.TRITON_ALLOWANCE[product.dtype], path=kernel
        )
    ]


# Problems and cases that devices share


def _quantizations(formats: Sequence[str], residual: bool = False) -> list[Quantization]:
    quantizations = []
    for number, format_name, group_size in spread(formats, GROUP_SIZES):
        dtype, scale_dtype = DTYPES[number % 3], DTYPES[number // 3 % 3]
        quantizations.append(Quantization(format_name, group_size, dtype, scale_dtype, bool(number % 2), residual))
    return quantizations


def _dequantizations(formats: Sequence[str], device: str) -> list[tuple[Layer, torch.dtype]]:
    dtypes = *DTYPES, torch.float64
    return [
        (Layer(format_name, group_size, 131, 330, device), dtypes[number % len(dtypes)])
        for number, format_name, group_size in spread(formats, GROUP_SIZES)
    ]


def _initializations(formats: Sequence[str]) -> list[Initialization]:
    """Shapes of which the smaller takes the exact solver by default, the larger the fast one."""
    shapes = (96, 160), (250, 330)
    return [
        Initialization(format_name, *(shape if i % 2 else shape[::-1]))
        for i, format_name in enumerate(formats)
        for shape in shapes
    ]


def _quantize_cases(quantizations: Sequence[Quantization], device: str) -> list[Case]:
    return [Case(q.label, lambda q=q: q.judge(q.run(OPS, device))) for q in quantizations]


def _dequantize_cases(layers: Sequence[tuple[Layer, torch.dtype]], ops: Any) -> list[Case]:
    return [
        Case(f"{layer.label}, {name_of(dtype)}", partial(dequantizing, layer, dtype, ops)) for layer, dtype in layers
    ]


def _product_cases(
    products: Sequence[Product], ops: Any, factor: float, allowance: float = 0.0, **options
) -> list[Case]:
    def find(product: Product) -> Finding:
        return product.judge(product.multiply(ops, **options), factor, allowance)

    return [Case(product.label, partial(find, product)) for product in products]


def _pack_cases(device: str) -> list[Case]:
    return [Case(f"{bits} bits", partial(unpacking, bits, OPS, device)) for bits in BITS]


def _initializer_cases(problems: Sequence[Initialization], device: str) -> list[Case]:
    return [Case(problem.label, lambda p=problem: p.judge(p.run(device))) for problem in problems]


def _decomposition_cases(name: str, device: str) -> list[Case]:
    return [
        Case(f"{size} columns, {name_of(dtype)}", partial(decomposing, name, size, dtype, device))
        for size in (1, 16, 80, 150)
        for dtype in (torch.float32, torch.float64)
    ]
