"""What the pictures of the benchmarks share beside `loftq_kernels.cli.pictures`: where a run was made, and ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loftq_kernels.cli import pictures
from loftq_kernels.cli.pictures import Line
from loftq_kernels.cli.processor import in_words

ROW_TICKS = tuple(2**i for i in range(14))


def place(machine: Mapping[str, Any]) -> str:
    """Processor, threads, kernels, torch and date. Files of before 2026-11-29 have fewer fields."""
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    commit = [f"commit {machine['commit']}"] if "commit" in machine else []
    kernels = f"{machine['cpu_kernels']} kernels"
    return ", ".join([in_words(machine), threads, kernels, f"torch {machine['torch']}", *commit, machine["date"]])


def ratios(axis: Any, rows: Sequence[Mapping[str, Any]], reference: str, lines: Mapping[str, Line]) -> None:
    """Speed relative to the reference over rows of x, one line for each contender that the rows have."""
    ends = []
    for name, line in lines.items():
        points = [(row["M"], row[reference] / row[name]) for row in rows if name in row and reference in row]
        if points:
            pictures.draw(axis, *zip(*points, strict=True), line)
            ends.append((*points[-1], line.label, line.colour))
    if not ends:
        raise ValueError(f"the results have no {reference}, or none of {', '.join(lines)} beside it")
    all_rows = sorted({row["M"] for row in rows})
    values = [value for line in axis.get_lines() for value in line.get_ydata()]
    axis.axhline(1, color="black", linewidth=1.2)
    below = not any(0.75 < line.get_ydata()[0] < 1 for line in axis.get_lines()[:-1])  # Whether there is room.
    at = {"textcoords": "offset points", "va": "top" if below else "bottom", "fontsize": 9.5}
    axis.annotate(f"{reference.replace('linear', 'F.linear')} = 1", (all_rows[0], 1), (0, -4 if below else 4), **at)
    pictures.powers_of_two(axis, "x", [tick for tick in ROW_TICKS if all_rows[0] <= tick <= all_rows[-1]])
    ticks = [2.0**i for i in range(-5, 8) if min(values) / 1.5 <= 2.0**i <= max(values) * 1.5]
    pictures.powers_of_two(axis, "y", ticks, [_fraction(tick) for tick in ticks])
    axis.set_xlim(all_rows[0] / 1.15, all_rows[-1])
    axis.set_ylim(min(values) / 1.12, max(values) * 1.12)
    pictures.label_ends(axis, ends)


def _fraction(value: float) -> str:
    return f"1/{1 / value:g}" if value < 1 else f"{value:g}"
