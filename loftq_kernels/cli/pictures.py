"""Pictures for people: few lines, each with its name at its end, ticks at powers of two, the source in a caption.

Sizes are for 800 pixels across; the files have twice as many. Colours are close to Okabe and Ito's, which colour-blind
people can tell apart, and no two lines differ by colour alone. matplotlib is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

BLUE, VERMILION, GREEN, PURPLE, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#B07800", "#666666"
WIDTH = 8.0  # inches, shown at 100 pixels each
_FONT = {"font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5}
_CAPTION_SIZE = 8.5
_END = "end of a line"  # marks its name among the texts of an axis


class Line(NamedTuple):
    """What is drawn for one contender; `dash` is a matplotlib line style, `filled` whether its marks are."""

    label: str
    colour: str
    mark: str = "o"
    dash: str = "-"
    width: float = 1.8
    filled: bool = True


def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns], without a frame at the top and on the right."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_FONT):
        made = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = made.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#E4E4E4", linewidth=0.8)
        axis.set_axisbelow(True)
    return made, axes


def draw(axis: Any, xs: Sequence[float], ys: Sequence[float], line: Line) -> None:
    """One line with a mark at each point. Empty marks are larger: they can be seen around what they coincide with."""
    axis.plot(
        xs,
        ys,
        linestyle=line.dash,
        linewidth=line.width,
        color=line.colour,
        marker=line.mark,
        markersize=5 if line.filled else 8,
        markerfacecolor=line.colour if line.filled else "none",
        clip_on=False,
    )


def powers_of_two(axis: Any, which: str, ticks: Sequence[float], texts: Sequence[str] | None = None) -> None:
    """A log2 axis ("x" or "y") with these ticks, written as plain numbers."""
    getattr(axis, f"set_{which}scale")("log", base=2)
    getattr(axis, f"set_{which}ticks")(ticks, texts or [f"{tick:g}" for tick in ticks])
    getattr(axis, f"{which}axis").set_minor_locator(_no_ticks())


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def label_ends(axis: Any, ends: Sequence[tuple[float, float, str, str]], size: float = 9.5) -> None:
    """Names at the right ends (x, y, text, colour) of lines; `save` moves them apart where they would overlap."""
    for x, y, text, colour in ends:
        at = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axis.annotate(text, (x, y), color=colour, fontsize=size, gid=_END, **at)


def _move_apart(axis: Any) -> None:
    pixels = axis.figure.dpi / 72
    labels = [text for text in axis.texts if text.get_gid() == _END]
    labels.sort(key=lambda label: axis.transData.transform(label.xy)[1])
    wanted = [axis.transData.transform(label.xy)[1] / pixels for label in labels]
    gap = max((1.3 * label.get_fontsize() for label in labels), default=0)
    for label, old, new in zip(labels, wanted, spread(wanted, gap), strict=True):
        label.set_position((8, new - old))


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Rising positions moved as little as keeps them a gap apart: groups that are too close share their middle."""
    groups: list[list[float]] = []  # The wanted positions of each group.
    for position in positions:
        groups.append([position])
        while len(groups) > 1 and _first(groups[-1], gap) < _last(groups[-2], gap) + gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_first(group, gap) + gap * i for group in groups for i in range(len(group))]


def _first(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _last(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def caption(made: Any, text: str) -> None:
    """What was measured, where and when, below the axes."""
    made.supxlabel(text, fontsize=_CAPTION_SIZE, color=GREY, x=0.01, ha="left")


def save(made: Any, path: Path) -> None:
    made.draw_without_rendering()  # This gives the axes their sizes, which the places of labels depend on.
    for axis in made.axes:
        _move_apart(axis)
    made.savefig(path, dpi=2 * made.dpi, format="png")
