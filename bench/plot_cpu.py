"""The picture of ``bench cpu``: speed relative to bf16 `F.linear` over rows of x, for the first shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.pictures import place, ratios
from loftq_kernels.cli import pictures
from loftq_kernels.cli.pictures import BLUE, GREEN, ORANGE, PURPLE, VERMILION, Line

REFERENCE = "bf16 linear"
LINES = {
    "nf4": Line("loftq_kernels nf4", BLUE, width=3),
    "bitsandbytes nf4": Line("bitsandbytes NF4", VERMILION, "s", "--"),
    "llama.cpp Q4_0": Line("llama.cpp Q4_0", GREEN, "^", "--"),
    "aten int4pack": Line("ATen int4pack", PURPLE, "D", "--"),
}
OTHERS = {"nf2": Line("loftq_kernels nf2", ORANGE, width=2)}  # Drawn where there is no nf4.


def plot(results: Mapping[str, Any], path: Path) -> None:
    shape = results["milliseconds"][0]["N x K"]
    rows = [row for row in results["milliseconds"] if row["N x K"] == shape]
    lines = LINES if "nf4" in rows[0] else OTHERS | LINES
    made, axes = pictures.figure(4.6)
    axis = axes[0, 0]
    size = shape.replace("x", " x ")
    axis.set_title(f"Speed of x Wᵀ relative to bf16 F.linear (higher is faster), W {size}", loc="left")
    axis.set(xlabel="rows of x", ylabel="times as fast as bf16")
    about = "Weights come from memory, x is bfloat16; medians of calls in turns. Other shapes: cpu.json."
    pictures.caption(made, f"{about}\n{place(results['machine'])}")
    ratios(axis, rows, REFERENCE, lines)
    pictures.save(made, path)
