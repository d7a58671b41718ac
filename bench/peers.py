"""Whom our products are compared with: one `Peer` for each, the same for `bench cpu` and `bench gpu`.

A peer is a record of how its weights are prepared and how they multiply. To add one, write its functions and put the
record into PEERS; see CONTRIBUTING.md. Whatever a peer needs is imported in its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench import ggml, harness
from bench.subject import installed

GROUP = 64
DTYPE = torch.bfloat16

Shape = tuple[int, int]  # [N, K]: out_features, in_features
Product = Callable[[Tensor], Tensor]  # x [M, K] -> y [M, N]


@dataclass(frozen=True)
class Peer:
    """`prepare(shape, device)` makes one weight, `compute(weight, x)` multiplies by it."""

    name: str
    devices: tuple[str, ...]  # of "cpu" and "cuda"
    bytes_per_weight: float
    prepare: Callable[[Shape, str], Any]
    compute: Callable[[Any, Tensor], Tensor]
    missing: Callable[[], str | None] = lambda: None  # why it is not here, with the remedy; None where it is
    quantized: bool = True


def package(name: str) -> Callable[[], str | None]:
    """`missing` of a peer that is a Python package."""
    return lambda: None if installed(name) else f"{name} is not installed (pip install {name})"


def products(peer: Peer, shape: Shape, rotated: int, device: str, x: Tensor | None = None) -> list[Product]:
    """One product for each of the weights that together exceed the caches. Each has been called once, with x."""
    nbytes = shape[0] * shape[1] * peer.bytes_per_weight
    calls = [partial(peer.compute, peer.prepare(shape, device)) for _ in harness.copies(nbytes, rotated)]
    x = torch.zeros(1, shape[1], dtype=DTYPE, device=device) if x is None else x
    for call in calls:  # What fails, fails here; what packs at the first call, packs here.
        call(x)
    return calls


def rotating(
    peers: Iterable[Peer], shape: Shape, rotated: int, device: str = "cpu", x: Tensor | None = None
) -> tuple[dict[str, Product], dict[str, str]]:
    """x -> y by name, another weight at every call; and why the others are missing."""
    made: dict[str, Product] = {}
    missing: dict[str, str] = {}
    for peer in peers:
        try:
            if (why := peer.missing()) is None:
                turns = cycle(products(peer, shape, rotated, device, x))
                made[peer.name] = lambda x, turns=turns: next(turns)(x)
                continue
        except Exception as error:  # Whatever a peer does or refuses, the others are measured.
            why = f"{type(error).__name__}: {error}"[:300]
        missing[peer.name] = why
    return made, missing


def select(device: str, names: Sequence[str] | None = None) -> list[Peer]:
    """The peers on a kind of device: those named, or all."""
    known: Mapping[str, Peer] = {peer.name: peer for peer in PEERS if device in peer.devices}
    if unknown := sorted(set(names or ()) - set(known)):
        raise ValueError(f"--peer {unknown[0]!r} is not known on {device}; known: {', '.join(known)}")
    return [peer for peer in known.values() if names is None or peer.name in names]


# ---- torch


def _dense(shape: Shape, device: str, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x.to(weight.dtype), weight)


def _int4pack(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Codes as ATen's int4 products want them on the device; scale and zero of each group."""
    scale_and_zero = torch.rand(shape[1] // GROUP, shape[0], 2, device=device).to(DTYPE)
    if device == "cpu":
        codes = torch.randint(0, 16, shape, dtype=torch.int32)
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scale_and_zero
    codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device=device)
    return torch.ops.aten._convert_weight_to_int4pack(codes, 8), scale_and_zero


def _int4pack_product(weight: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """On CUDA it is tinygemm, which torchao's weight-only int4 calls on Hopper and before."""
    aten = torch.ops.aten
    product = aten._weight_int4pack_mm if x.is_cuda else aten._weight_int4pack_mm_for_cpu
    return product(x, weight[0], GROUP, weight[1])


# ---- bitsandbytes


def _bitsandbytes(shape: Shape, device: str) -> Any:
    if device == "cuda":
        from bitsandbytes.functional import quantize_4bit

        return quantize_4bit(torch.randn(shape, device=device, dtype=DTYPE), blocksize=GROUP, quant_type="nf4")
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", compute_dtype=DTYPE)
    return layer.to(DTYPE).to("cpu").eval()  # The move quantizes, and the first call packs.


def _bitsandbytes_product(weight: Any, x: Tensor) -> Tensor:
    if not isinstance(weight, tuple):
        return weight(x)
    import bitsandbytes

    codes, state = weight
    return bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)


# ---- gemlite


def _gemlite(shape: Shape, device: str) -> Product:
    import gemlite

    layer = gemlite.GemLiteLinear(4, GROUP, shape[1], shape[0], gemlite.DType.BF16, gemlite.DType.BF16)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=device)
    scales = torch.rand(shape[0] * shape[1] // GROUP, 1, device=device, dtype=DTYPE)
    layer.pack(codes, scales, 8.0, None)
    return layer.forward


PEERS = (
    Peer("bf16 linear", ("cpu", "cuda"), 2, _dense, _linear, quantized=False),
    Peer("fp32 linear", ("cpu",), 4, partial(_dense, dtype=torch.float32), _linear, quantized=False),
    Peer(
        "bitsandbytes nf4", ("cpu", "cuda"), 0.5, _bitsandbytes, _bitsandbytes_product, missing=package("bitsandbytes")
    ),
    Peer("aten int4pack", ("cpu", "cuda"), 0.5, _int4pack, _int4pack_product),
    Peer("gemlite int4", ("cuda",), 0.5, _gemlite, lambda forward, x: forward(x), missing=package("gemlite")),
    *(
        Peer(
            f"llama.cpp {name}",
            ("cpu",),
            0.5625,
            partial(ggml.weight, name),
            lambda weight, x: weight(x.float()),  # ggml takes float32.
            missing=ggml.missing,
        )
        for name in ggml.TYPES
    ),
)
