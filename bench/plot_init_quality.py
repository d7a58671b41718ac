"""The picture of ``bench init_quality``: how far final errors lie above the exact solver's, case by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.pictures import place
from loftq_kernels.cli import pictures
from loftq_kernels.cli.pictures import BLUE, GREY, VERMILION, Line

LINES = {
    "T=1": Line("one alternation", BLUE, mark="", dash="--", width=2),
    "T=5": Line("five alternations", VERMILION, mark="", width=2),
}


def plot(results: Mapping[str, Any], path: Path) -> None:
    rows, limit = results["rows"], _percent(results["summary"]["limit"])
    made, axes = pictures.figure(4.8)
    axis = axes[0, 0]
    lowest = 0.0
    for steps, line in LINES.items():
        values = sorted(_percent(row[f"auto / exact at {steps}"]) for row in rows)
        pictures.draw(axis, [100 * (i + 0.5) / len(values) for i in range(len(values))], values, line)
        lowest = min(lowest, values[0])
    ends = [
        (100, _percent(max(row[f"auto / exact at {steps}"] for row in rows)), line) for steps, line in LINES.items()
    ]
    highest = max([limit, *(end[1] for end in ends), *_beyond(rows, limit)])
    axis.set_xlim(0, 100)
    axis.set_ylim(1.15 * lowest - 0.02, 1.12 * highest)
    axis.axhline(0, color="black", linewidth=1)
    axis.axhline(limit, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)))
    _explain(axis, rows, limit, lowest)
    axis.set_title("Final LoftQ error against the exact solver's (lower is better)", loc="left")
    axis.set(xlabel="share of the cases, sorted, %", ylabel="% above the exact solver's error")
    pictures.caption(made, f"{_about(rows)}\n{place(results['machine'])}")
    pictures.label_ends(axis, [(x, y, line.label, line.colour) for x, y, line in ends])
    pictures.save(made, path)


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def _beyond(rows: Sequence[Mapping[str, Any]], limit: float) -> list[float]:
    """The cases of `svd="fast"`, forced where "auto" takes the exact solver, that are beyond the limit."""
    ratios = [row[f"fast / exact at {steps}"] for row in rows for steps in LINES]
    return [_percent(ratio) for ratio in ratios if _percent(ratio) > limit]


def _explain(axis: Any, rows: Sequence[Mapping[str, Any]], limit: float, lowest: float) -> None:
    """Name the limit, what is beyond it, and why a case can lie below zero."""
    beyond = _beyond(rows, limit)
    axis.annotate(
        f"limit: {limit:.1f}% above", (1, limit), (0, 4), textcoords="offset points", color=GREY, fontsize=9.5
    )
    over = sum(_percent(row[f"auto / exact at {steps}"]) > limit for row in rows for steps in LINES)
    text = f'With svd="auto", the default, {over or "none"} of the cases {"are" if over > 1 else "is"} beyond it.'
    if beyond:
        axis.plot([98.5] * len(beyond), beyond, "x", color="black", markersize=8, markeredgewidth=2, clip_on=False)
        text += f'\n× marks {len(beyond)} with svd="fast" forced, where "auto" takes the exact solver.'
    axis.annotate(text, (97, limit), (-4, -6), textcoords="offset points", ha="right", va="top", fontsize=9.5)
    below = "Below 0: alternations from an exact step\nneed not end lower than from a near one."
    axis.annotate(below, (99, lowest), ha="right", va="bottom", fontsize=9.5)


def _about(rows: Sequence[Mapping[str, Any]]) -> str:
    formats = ", ".join(dict.fromkeys(row["format"] for row in rows))
    ranks = ", ".join(map(str, sorted({row["rank"] for row in rows})))
    kinds = ", ".join(dict.fromkeys(row["weights"].split()[0].replace("low", "low rank + noise") for row in rows))
    return f"{len(rows)} cases: {formats}; ranks {ranks}; weights: {kinds}; both orders of steps."
