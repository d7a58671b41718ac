"""The picture of ``bench init``: seconds and final error of our initializer and of two loops, on one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.bench_init import OURS, PEFT, RANDOMIZED
from bench.pictures import place
from loftq_kernels.cli import pictures
from loftq_kernels.cli.pictures import BLUE, VERMILION

ROWS = (  # Label, fields of seconds and error, name in "measured, seconds", times that.
    ("loftq_kernels", "seconds", "error", OURS, False),
    ("same loop with torch.svd_lowrank", "svd_lowrank loop, seconds", "svd_lowrank loop, error", RANDOMIZED, False),
    (
        "PEFT's loop, full SVD",
        "PEFT-style loop, seconds (one alternation x num_iter)",
        "PEFT-style loop, error",
        PEFT,
        True,
    ),
)


def plot(results: Mapping[str, Any], path: Path) -> None:
    found = results.get("speed") or next(part for name, part in results.items() if name.startswith("speed"))
    rows = [row for row in ROWS if row[1] in found]
    made, axes = pictures.figure(2.9)
    axis = axes[0, 0]
    low, high = (limit(found[row[1]] for row in rows) for limit in (min, max))
    for i, row in enumerate(rows):
        _draw(axis, i, found, row, to_the_left=found[row[1]] > (low * high) ** 0.5)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.set_ylim(len(rows) - 0.6, -0.75)
    axis.set_xlim(low / 1.6, high * 1.6)
    pictures.powers_of_two(axis, "x", [2.0**i for i in range(-8, 14) if low / 1.6 <= 2.0**i <= high * 1.6])
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("seconds (further left is faster)")
    n, k = found["shape"]
    what = f"{found['format']}, rank {found['rank']}, {found['num_iter']} alternations"
    axis.set_title(f"LoftQ of one {n} x {k} matrix: {what}", loc="left")
    note = "Medians of 5, in turns; PEFT's: one alternation, times five. Error: ||W - Q - BA|| / ||W|| at the end."
    note += " Lines: least to most." if "measured, seconds" in found else ""
    pictures.caption(made, f"{note}\n{place(results['machine'])}")
    pictures.save(made, path)


def _draw(axis: Any, at: int, found: Mapping[str, Any], row: tuple, to_the_left: bool) -> None:
    """A mark, its range where the file has one, and the figures in words on the side that has room."""
    colour, mark = (BLUE, "o") if row[0] == OURS else (VERMILION, "s")
    axis.plot(_range(found, row), [at, at], color=colour, linewidth=2)
    axis.plot([found[row[1]]], [at], mark, color=colour, markersize=8)
    offset, side = ((6, 8), "right") if to_the_left else ((-6, 8), "left")
    where = {"xytext": offset, "textcoords": "offset points", "ha": side}
    axis.annotate(_label(found, row), (found[row[1]], at), color=colour, **where)


def _range(found: Mapping[str, Any], row: tuple) -> tuple[float, float]:
    """Least and most seconds, where the file has them."""
    spread = found.get("measured, seconds", {}).get("spread", {}).get(row[3])
    if spread is None:
        return (found[row[1]],) * 2
    factor = found["num_iter"] if row[4] else 1
    return factor * spread[0], factor * spread[4]


def _label(found: Mapping[str, Any], row: tuple) -> str:
    """Seconds, how many times ours, error."""
    seconds = found[row[1]]
    parts = [f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"]
    if row[1] != "seconds":
        parts.append(f"{seconds / found['seconds']:.{0 if seconds > 10 * found['seconds'] else 1}f} times ours")
    return ", ".join([*parts, f"error {found[row[2]]:.4f}"] if row[2] in found else parts)
