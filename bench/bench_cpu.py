"""`qlora_linear` on CPU tensors against every peer, side by side; the whole of MiniLM against its bfloat16 model.

Weights are rotated over more than the caches hold, calls of all contenders take turns, times are medians.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import loftq_kernels as lk
from bench import ggml, harness

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
ROTATED_BYTES = 300 << 20
GROUP = 64
QUANTIZED_PEERS = ("bitsandbytes nf4", "aten int4pack", *(f"llama.cpp {name}" for name in ggml.TYPES))
DENSE_PEERS = ("bf16 linear", "fp32 linear")


def run(output: Path, *, quick: bool) -> None:
    shapes, rows = (((512, 512),), (1, 16)) if quick else (SHAPES, ROWS)
    rotated = ROTATED_BYTES // 64 if quick else ROTATED_BYTES
    bandwidth = harness.read_bandwidth()
    results: dict[str, Any] = {"read bandwidth, GB/s": bandwidth / 1e9, "milliseconds": [], "AVX2, milliseconds": []}
    for shape in shapes:
        results["milliseconds"] += products(shape, rows, rotated, torch.bfloat16, contenders(shape, rotated))
    with forced_isa("avx2"):
        few = tuple(m for m in rows if m <= 16)
        avx2 = {
            "nf4": packed_contender("nf4", shapes[0], rotated),
            "fp32 linear": dense_contender(shapes[0], torch.float32, rotated),
        }
        results["AVX2, milliseconds"] = products(shapes[0], few, rotated, torch.float32, avx2)
    results["backward, milliseconds"] = backward(shapes[0], tuple(m for m in rows if m >= 16), rotated)
    results["MiniLM"] = minilm(batches=1 if quick else 8)
    results["targets"] = targets(results, bandwidth)
    harness.print_table(results["targets"])
    harness.write_json(output / ("cpu_quick.json" if quick else "cpu.json"), results)
    if not quick:
        plot(results["milliseconds"], output / "cpu.png")


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


# ---- contenders: x -> y, another weight at every call

Product = Callable[[Tensor], Tensor]


def contenders(shape: tuple[int, int], rotated: int) -> dict[str, Product]:
    ours = {
        "nf4": packed_contender("nf4", shape, rotated),
        "nf4 r=16": packed_contender("nf4", shape, rotated, rank=16),
        "nf4 r=64": packed_contender("nf4", shape, rotated, rank=64),
        "nf2": packed_contender("nf2", shape, rotated),
        "int4": packed_contender("int4", shape, rotated),
        "int8": packed_contender("int8", shape, rotated),
    }
    peers = {
        "bitsandbytes nf4": bitsandbytes_contender(shape, rotated),
        "aten int4pack": int4pack_contender(shape, rotated),
        "bf16 linear": dense_contender(shape, torch.bfloat16, rotated),
        "fp32 linear": dense_contender(shape, torch.float32, rotated),
    }
    if ggml.available():
        peers |= {f"llama.cpp {name}": ggml.contender(name, shape, rotated) for name in ggml.TYPES}
    return ours | peers


def random_packed(name: str, shape: tuple[int, int]) -> lk.PackedTensor:
    """Random codes and scales of the right sizes: how fast a product is does not depend on their values."""
    rows, columns = shape
    small = lk.quantize(torch.randn(1, columns), name, GROUP)
    codes = torch.randint(0, 256, (rows, small.codes.shape[1]), dtype=torch.uint8)
    scale, offset = (
        None if group is None else (torch.rand(rows, group.shape[1]) * 0.02).to(group.dtype)
        for group in (small.scale, small.offset)
    )
    return lk.PackedTensor(
        codes, scale, offset, small.codebook, in_features=columns, group_size=GROUP, format=small.format
    )


def packed_contender(name: str, shape: tuple[int, int], rotated: int, rank: int | None = None) -> Product:
    rows, columns = shape

    def adapter(*size: int) -> Tensor | None:
        return None if rank is None else torch.randn(size).to(torch.bfloat16)

    first = random_packed(name, shape)
    weights = [first] + [random_packed(name, shape) for _ in harness.copies(first.nbytes, rotated)][1:]
    layers = cycle([(packed, adapter(rank, columns), adapter(rows, rank)) for packed in weights])
    return lambda x: lk.qlora_linear(x, *next(layers))


def dense_contender(shape: tuple[int, int], dtype: torch.dtype, rotated: int) -> Product:
    weights = cycle(
        [torch.randn(shape).to(dtype) for _ in harness.copies(shape[0] * shape[1] * dtype.itemsize, rotated)]
    )
    return lambda x: linear(x.to(dtype), next(weights))


def bitsandbytes_contender(shape: tuple[int, int], rotated: int) -> Product:
    import bitsandbytes

    rows, columns = shape

    def layer() -> torch.nn.Module:
        made = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
        made = made.to(torch.bfloat16).to("cpu").eval()  # The move quantizes, and the first call packs.
        made(torch.zeros(1, columns, dtype=torch.bfloat16))
        return made

    layers = cycle([layer() for _ in harness.copies(rows * columns // 2, rotated)])
    return lambda x: next(layers)(x)


def int4pack_contender(shape: tuple[int, int], rotated: int) -> Product:
    rows, columns = shape

    def weight() -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        scale_and_zero = torch.rand(columns // GROUP, rows, 2).to(torch.bfloat16)
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scale_and_zero

    weights = cycle([weight() for _ in harness.copies(rows * columns // 2, rotated)])

    def product(x: Tensor) -> Tensor:
        codes, scale_and_zero = next(weights)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, scale_and_zero)

    return product


# ---- measurements


@torch.inference_mode()
def products(
    shape: tuple[int, int], rows: tuple[int, ...], rotated: int, dtype: torch.dtype, variants: dict[str, Product]
) -> list[dict]:
    results = []
    for m in rows:
        x = torch.randn(m, shape[1]).to(dtype)
        calls = {name: (lambda product=product, x=x: product(x)) for name, product in variants.items()}
        times = harness.interleaved(calls, repeats=101 if m <= 16 else 31 if m <= 64 else 9)
        results.append({"N x K": f"{shape[0]}x{shape[1]}", "M": m} | {key: 1e3 * t for key, t in times.items()})
        harness.print_table(results[-1:])
    return results


def backward(shape: tuple[int, int], rows: tuple[int, ...], rotated: int) -> list[dict]:
    """grad_x = grad_y W through the packed weight, a dense bf16 weight, and one dequantized at every call."""
    packed = random_packed("nf4", shape)
    weights = cycle([packed] + [random_packed("nf4", shape) for _ in harness.copies(packed.nbytes, rotated)][1:])
    dense = cycle([torch.randn(shape).to(torch.bfloat16) for _ in harness.copies(2 * shape[0] * shape[1], rotated)])
    op = torch.ops.loftq_kernels.qlora_linear_grad_input

    def ours(grad: Tensor) -> Tensor:
        p = next(weights)
        return op(grad, p.codes, p.scale, p.offset, p.codebook, p.shape[1], p.group_size, None, None, 1.0)

    variants = {
        "nf4": ours,
        "dequantize, then bf16 matmul": lambda grad: grad @ next(weights).dequantize(torch.bfloat16),
        "bf16 matmul": lambda grad: grad @ next(dense),
    }
    transposed = shape[1], shape[0]  # grad_y has as many columns as the weight has rows.
    return products(transposed, rows, rotated, torch.bfloat16, variants)


@torch.inference_mode()
def minilm(batches: int) -> dict:
    """Sentences per second of all-MiniLM-L6-v2 in batches of 32, bf16: dense and nf4 with r=16; bytes of each model."""
    from loftq_kernels.cli import demo

    sentences = demo.read_sentences(32 * batches)
    models = {}
    for name in ("bf16", "nf4 r=16"):
        model, tokenizer = demo.load_model()
        model = model.to(torch.bfloat16).eval()
        if name != "bf16":
            lk.quantize_model(model, lk.QuantConfig(format="nf4", rank=16), progress=False)
        models[name] = model
    tokens = [
        tokenizer(sentences[i : i + 32], padding=True, truncation=True, return_tensors="pt")
        for i in range(0, len(sentences), 32)
    ]
    calls = {name: (lambda model=model: [model(**batch) for batch in tokens]) for name, model in models.items()}
    seconds = harness.interleaved(calls, repeats=9)
    return {
        name: {
            "sentences/s": len(sentences) / seconds[name],
            "MiB": sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**20,
        }
        for name, model in models.items()
    }


# ---- targets


def targets(results: dict, bandwidth: float) -> list[dict]:
    """The aims of the kernels as ratios of this run; `met` says whether the medians reach them."""
    rows: list[dict] = []

    def aim(what: str, row: dict, value: float, least: float) -> None:
        where = f"{row['N x K']} M={row['M']}" if "M" in row else "MiniLM"
        rows.append({"target": what, "at": where, "value": value, "aim >=": least, "met": value >= least})

    for row in results["milliseconds"]:
        m, nf4 = row["M"], row["nf4"]
        dense, quantized = (min(row[name] for name in names if name in row) for names in (DENSE_PEERS, QUANTIZED_PEERS))
        size = [int(n) for n in row["N x K"].split("x")]
        if m == 1:
            seconds = size[0] * size[1] * (0.5 + 2 / GROUP) / bandwidth
            aim("nf4: share of the read bandwidth", row, 1e3 * seconds / nf4, 0.8)
            aim("nf4 against the best quantized peer", row, quantized / nf4, 1.5)
            aim("nf2 against our nf4", row, nf4 / row["nf2"], 1.5)
            aim("nf4 against it with r=16", row, nf4 / row["nf4 r=16"], 1 / 1.05)
            aim("nf4 against it with r=64", row, nf4 / row["nf4 r=64"], 1 / 1.15)
        if m in (4, 8, 16):
            aim("nf4 against the best of all peers", row, min(dense, quantized) / nf4, 2.0)
        if m in (64, 128):
            aim("nf4 against bf16 linear", row, row["bf16 linear"] / nf4, 1.3)
        if m == 128:
            aim("nf4 against it with r=16", row, nf4 / row["nf4 r=16"], 1 / 1.10)
            aim("nf4 against it with r=64", row, nf4 / row["nf4 r=64"], 1 / 1.10)
        if m == 512:
            aim("nf4 against bf16 linear", row, row["bf16 linear"] / nf4, 1.0)
    for row in results["AVX2, milliseconds"]:
        aim("AVX2 forced, float32: nf4 against fp32 linear", row, row["fp32 linear"] / row["nf4"], 1.0)
    speed = {name: model["sentences/s"] for name, model in results["MiniLM"].items()}
    aim("sentences/s, nf4 r=16 against bf16", {}, speed["nf4 r=16"] / speed["bf16"], 1.0)
    size = {name: model["MiB"] for name, model in results["MiniLM"].items()}
    aim("bytes of bf16 against nf4 r=16", {}, size["bf16"] / size["nf4 r=16"], 1.0)
    return rows


def plot(measured: list[dict], path: Path) -> None:
    """Plot the times of every contender over M, one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(row["N x K"] for row in measured))
    figure, axes = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4.5), layout="constrained", squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        rows = [row for row in measured if row["N x K"] == shape]
        for name in rows[0]:
            if name not in ("N x K", "M"):
                style = "--" if name in QUANTIZED_PEERS + DENSE_PEERS else "-"
                axis.plot([row["M"] for row in rows], [row[name] for row in rows], style, label=name)
        axis.set(xscale="log", yscale="log", title=shape, xlabel="rows of x (M)", ylabel="ms")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
