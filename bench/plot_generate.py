"""The picture of ``bench generate``: decode speed relative to bf16 transformers over sequences at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.models import DENSE
from bench.pictures import place, ratios
from loftq_kernels.cli import pictures
from loftq_kernels.cli.pictures import BLUE, GREEN, ORANGE, PURPLE, VERMILION, Line

LINES = {
    "nf4 + head": Line("loftq_kernels nf4, head too", BLUE, width=3),
    "nf4": Line("loftq_kernels nf4", BLUE, width=1.8),
    "nf2 + head": Line("loftq_kernels nf2, head too", ORANGE, width=3),
    "bitsandbytes nf4": Line("bitsandbytes NF4", VERMILION, "s", "--"),
    "llama.cpp Q4_0": Line("llama.cpp Q4_0, head too", GREEN, "^", "--"),
    "aten int4pack": Line("ATen int4pack", PURPLE, "D", "--"),
}


def plot(results: Mapping[str, Any], path: Path) -> None:
    rows = [row | {"M": row["size"]} for row in results["milliseconds"] if row["what"] == "decode"]
    made, axes = pictures.figure(4.6)
    axis = axes[0, 0]
    about = results["model"]
    axis.set_title("Decoding with a Llama of 1.2 billion weights: tokens per second, bf16 = 1", loc="left")
    axis.set(xlabel="sequences at once", ylabel="times as fast as bf16 transformers")
    ratios(axis, rows, DENSE, LINES)
    note = f"Random weights, shape of Llama-3.2-1B, {about['context']} tokens of context; medians of turns."
    pictures.caption(made, f"{note}\n{place(results['machine'])}")
    pictures.save(made, path)
