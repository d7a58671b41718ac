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
    "nf4 + head + attention": Line("loftq_kernels nf4, head, attention", BLUE, width=3),
    "nf4 + head": Line("loftq_kernels nf4, head", BLUE, "v"),
    "nf4": Line("loftq_kernels nf4", BLUE, filled=False),
    "nf2 + head": Line("loftq_kernels nf2, head", ORANGE, width=2),
    "bitsandbytes nf4": Line("bitsandbytes NF4", VERMILION, "s", "--"),
    "llama.cpp Q4_0": Line("llama.cpp Q4_0, head", GREEN, "^", "--"),
    "aten int4pack": Line("ATen int4pack", PURPLE, "D", "--"),
}


def plot(results: Mapping[str, Any], path: Path) -> None:
    rows = [row | {"M": row["size"]} for row in results["milliseconds"] if row["what"] == "decode"]
    made, axes = pictures.figure(4.6)
    axis = axes[0, 0]
    about = results["model"]
    axis.set_title("Decode speed of a whole Llama relative to bf16 transformers (higher is faster)", loc="left")
    axis.set(xlabel="sequences at once", ylabel="times as fast as bf16 transformers")
    ratios(axis, rows, DENSE, LINES)
    size = f"{about['num_hidden_layers']} layers of {about['hidden_size']}, {about['vocab_size']} words"
    note = f"Random weights, {size}, {about['context']} tokens of context; medians of turns in random order."
    pictures.caption(made, f"{note}\n{place(results['machine'])}")
    pictures.save(made, path)
