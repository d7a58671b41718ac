"""Our own products, as the benchmarks of both kinds of device call them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import loftq_kernels as lk
from bench.peers import DTYPE, GROUP, Peer, Shape

VARIANTS = (("nf4", None), ("nf4", 16), ("nf4", 64), ("nf2", None), ("int4", None), ("int8", None))  # format, rank


def variants(formats: list[str] | None) -> list[tuple[str, int | None]]:
    """The standard formats and ranks; or each of the formats given, without adapter and with ranks 16 and 64."""
    if formats is None:
        return list(VARIANTS)
    if unknown := sorted(set(formats) - set(lk.format_names())):
        raise ValueError(f"--format {unknown[0]!r} is not known; known: {', '.join(lk.format_names())}")
    return [(name, rank) for name in formats for rank in (None, 16, 64)]


def random_packed(name: str, shape: Shape, device: str = "cpu") -> lk.PackedTensor:
    """Random codes and scales of the right sizes: how fast a product is does not depend on their values."""
    rows, columns = shape
    small = lk.quantize(torch.randn(1, columns), name, GROUP)
    codes = torch.randint(0, 256, (rows, small.codes.shape[1]), dtype=torch.uint8, device=device)
    scale, offset = (
        None if group is None else (torch.rand(rows, group.shape[1], device=device) * 0.02).to(group.dtype)
        for group in (small.scale, small.offset)
    )
    codebook = small.codebook.to(device)
    return lk.PackedTensor(codes, scale, offset, codebook, in_features=columns, group_size=GROUP, format=small.format)


def label(format: str, rank: int | None) -> str:
    return format if rank is None else f"{format} r={rank}"


def product(format: str, rank: int | None = None, compute: Callable[[Any, Tensor], Tensor] | None = None) -> Peer:
    """`qlora_linear` through a packed weight, with an adapter of a rank, as a record like those of the peers."""
    bits = 8 * random_packed(format, (1, 4096)).nbytes / 4096
    prepare = partial(_layer, format, rank)
    return Peer(label(format, rank), ("cpu", "cuda"), bits / 8, prepare, compute or _qlora_linear)


def _layer(format: str, rank: int | None, shape: Shape, device: str) -> tuple[lk.PackedTensor, Any, Any]:
    def adapter(*size: int) -> Tensor | None:
        return None if rank is None else torch.randn(size, device=device, dtype=DTYPE)

    return random_packed(format, shape, device), adapter(rank, shape[1]), adapter(shape[0], rank)


def _qlora_linear(layer: tuple[lk.PackedTensor, Any, Any], x: Tensor) -> Tensor:
    return lk.qlora_linear(x, *layer)


def grad_input(format: str) -> Peer:
    """grad_x = grad_y W through the packed weight W; what it takes has as many columns as W has rows."""
    op = torch.ops.loftq_kernels.qlora_linear_grad_input

    def compute(layer: tuple, grad: Tensor) -> Tensor:
        p = layer[0]
        return op(grad, p.codes, p.scale, p.offset, p.codebook, p.shape[1], p.group_size, None, None, 1.0)

    return product(format, compute=compute)
