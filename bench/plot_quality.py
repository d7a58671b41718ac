"""The picture of ``bench quality``: perplexity over ranks, and over the steps of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from bench.bench_quality import FORMATS, _values
from bench.pictures import place
from loftq_kernels.cli import pictures
from loftq_kernels.cli.pictures import BLUE, VERMILION, Line
from loftq_kernels.recipes import finetune

COLUMNS = {"start": ("LoftQ's start", "--", False), "rilq": ("after RILQ", "-", True)}
STARTS = {"qlora": ("QLoRA's start", "--", False), "loftq": ("LoftQ's start", "-", True)}
COLOURS, MARKS = (VERMILION, BLUE), ("s", "o")


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Lines are means over seeds, dots single seeds."""
    made, axes = pictures.figure(4.4, columns=2)
    _over_ranks(axes[0, 0], results)
    _over_steps(axes[0, 1], results)
    seeds = len(results["sizes"]["seeds"])
    about = f"A byte-level language model of 4 layers; lines are means of {seeds} seeds, dots single seeds."
    pictures.caption(made, f"{about}\n{place(results['machine'])}")
    for axis in axes.flat:
        pictures.label_ends(axis, _ends(axis), size=9)
    pictures.save(made, path)


def _over_ranks(axis: Any, results: Mapping[str, Any]) -> None:
    ranks, rows = results["sizes"]["ranks"], results["rows"]
    for format, colour, mark in zip(FORMATS, COLOURS, MARKS, strict=True):
        for column, (what, dash, filled) in COLUMNS.items():
            values = [_values(rows, format, "lora", rank, column) for rank in ranks]
            line = Line(f"{format}, {what}", colour, mark, dash, filled=filled)
            pictures.draw(axis, ranks, [mean(v) for v in values], line)
            axis.get_lines()[-1].set_gid(f"{format}, {what}")
            dots = [(rank, value) for rank, of_rank in zip(ranks, values, strict=True) for value in of_rank]
            axis.plot(*zip(*dots, strict=True), ".", color=colour, markersize=4, alpha=0.6)
    pictures.powers_of_two(axis, "x", [2.0**i for i in range(8) if ranks[0] <= 2**i <= ranks[-1]])
    axis.set_title("2 bits, English", loc="left")
    axis.set(xlabel="rank", ylabel="held-out perplexity (lower is better)")


def _over_steps(axis: Any, results: Mapping[str, Any]) -> None:
    for format, colour, mark in zip(finetune.FORMATS, COLOURS, MARKS, strict=True):
        for init, (what, dash, filled) in STARTS.items():
            runs = [c for c in results["fine-tuning"] if (c["format"], c["init"]) == (format, init)]
            average = [mean(values) for values in zip(*(c["perplexity"] for c in runs), strict=True)]
            pictures.draw(axis, runs[0]["steps"], average, Line("", colour, mark, dash, filled=filled))
            axis.get_lines()[-1].set_gid(f"{format}, {what}")
    axis.set_title("Fine-tuned on code, rank 8", loc="left")
    axis.set_xticks(runs[0]["steps"])
    axis.set(xlabel="step")


def _ends(axis: Any) -> list[tuple[float, float, str, str]]:
    named = [line for line in axis.get_lines() if line.get_gid()]
    return [(line.get_xdata()[-1], line.get_ydata()[-1], line.get_gid(), line.get_color()) for line in named]
