"""The picture of ``bench gpu``: speed relative to bf16 over rows of x, a panel for each part and shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.pictures import ratios
from loftq_kernels.cli import pictures
from loftq_kernels.cli.pictures import BLUE, GREEN, PURPLE, VERMILION, Line

REFERENCES = {"decode": "bf16 linear", "prefill": "bf16 linear", "backward": "bf16 matmul"}
LINES = {
    "nf4": Line("ours, nf4", BLUE, width=3),
    "bitsandbytes nf4": Line("bitsandbytes", VERMILION, "s", "--"),
    "aten int4pack": Line("ATen int4", PURPLE, "D", "--"),
    "gemlite int4": Line("gemlite int4", GREEN, "^", "--"),
}


def plot(results: Mapping[str, Any], path: Path) -> None:
    rows = results["microseconds"]
    compared = [row for row in rows if REFERENCES[row["part"]] in row and LINES.keys() & row.keys()]
    panels = list(dict.fromkeys((row["part"], row["N x K"]) for row in compared))
    if not panels:
        raise ValueError("no row has bf16 and one of the others")
    made, axes = pictures.figure(0.6 + 2.8 * -(-len(panels) // 2), rows=-(-len(panels) // 2), columns=2)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (part, shape) in zip(axes.flat, panels, strict=False):
        own = sorted((row for row in rows if (row["part"], row["N x K"]) == (part, shape)), key=lambda row: row["M"])
        axis.set_title(f"{part}, W {shape.replace('x', ' x ')}", loc="left")
        axis.set(xlabel="rows of x", ylabel="times as fast as bf16")
        ratios(axis, own, REFERENCES[part], LINES)
    about, machine = results["device"], results["machine"]
    clock = f"SM clock {about.get('clocks.sm', 'unknown')}"
    software = f"torch {machine['torch']}, triton {machine['triton']}"
    pictures.caption(made, f"{about['name']}, {clock}, {software}, {machine['date']}")
    pictures.save(made, path)
