"""What every benchmark shares: interleaved timing, its spread, progress, JSON files, tables."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple, TypeVar

import torch

from bench.machine import machine

NO_TIMES = "none: these figures are no times"  # A file's "spread" where nothing was timed.
MOST_COPIES = 512
NEEDED = ("processor", "processor_model", "processor_isa", "threads", "torch", "python", "commit", "date", "command")

Item = TypeVar("Item")


class Timing(NamedTuple):
    """Seconds of one variant's calls: the least, the quartiles, the most."""

    least: float
    lower: float
    median: float
    upper: float
    most: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        lower, _, upper = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return cls(min(seconds), lower, median(seconds), upper, max(seconds), len(seconds))


def timings(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """How long each variant takes.

    Variants take turns, so that a slow minute of the machine hits all alike, and their order changes: what ran before
    leaves caches and threads in a state that may cost the next variant half of its time.
    """
    for run in variants.values():
        run()  # First calls load libraries, allocate and compile.
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    shuffle = random.Random(0).shuffle
    order = list(variants.items())
    for _ in range(repeats):
        shuffle(order)
        for name, run in order:
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: Timing.of(values) for name, values in seconds.items()}


def interleaved(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant, for what needs no spread."""
    return {name: timing.median for name, timing in timings(variants, repeats).items()}


def timed_row(place: Mapping[str, Any], measured: Mapping[str, Timing], per_second: float = 1.0) -> dict[str, Any]:
    """A row of results: where it was measured, the median of each variant, repeats, and the spread of each.

    ``per_second`` is 1e3 for milliseconds. The spread is [least, lower quartile, median, upper quartile, most].
    """
    spread = {name: [per_second * value for value in timing[:5]] for name, timing in measured.items()}
    medians = {name: values[2] for name, values in spread.items()}
    repeats = {timing.repeats for timing in measured.values()}
    return {**place, **medians, "repeats": max(repeats, default=0), "spread": spread}


def copies(nbytes: float, rotated: int) -> range:
    """One index for each of the weights of nbytes that together exceed the caches: at least `rotated` bytes.

    Of weights far below a megabyte there are MOST_COPIES: they stay in the caches, as they would in a small model.
    """
    return range(min(max(2, int(-(-rotated // nbytes))), MOST_COPIES))


def read_bandwidth(megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes per second that this process reads from memory with all threads: a sum over a buffer beyond the caches."""
    buffer = torch.ones(megabytes << 18, dtype=torch.int32)
    return buffer.nbytes / interleaved({"sum": lambda: buffer.view(torch.int64).sum()}, repeats)["sum"]


def progress(items: Sequence[Item], describe: Callable[[Item], str]) -> Iterator[Item]:
    """The items, each with a line on standard error as its turn comes."""
    started = time.perf_counter()
    for i, item in enumerate(items, 1):
        print(
            f"[{i}/{len(items)}, {time.perf_counter() - started:.0f} s] {describe(item)}", file=sys.stderr, flush=True
        )
        yield item


def result_file(output: Path, subject: str, *, quick: bool) -> Path:
    """The JSON file of a subject. A quick run has another name, so that it cannot pass for a full one."""
    return output / f"{subject}{'_quick' if quick else ''}.json"


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results and the machine's description. The file is replaced at once, as a run may be cut any time."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def faults(results: Mapping[str, Any]) -> list[str]:
    """What a results file lacks that its readers need; the tests hold every benchmark to it."""
    about = results.get("machine", {})
    found = [f"machine has no {name}" for name in NEEDED if not about.get(name)]
    rows = list(_timed(results))
    if not rows and not str(results.get("spread", "")).startswith("none: "):
        found.append('no row has a spread, and no top-level "spread" says that nothing was timed')
    return found + [fault for row in rows for fault in _row_faults(row)]


def _timed(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, dict):
        if isinstance(value.get("spread"), dict):
            yield value
        for part in value.values():
            yield from _timed(part)
    elif isinstance(value, list):
        for part in value:
            yield from _timed(part)


def _row_faults(row: Mapping[str, Any]) -> Iterator[str]:
    if not (isinstance(row.get("repeats"), int) and row["repeats"] > 0):
        yield f"repeats is {row.get('repeats')!r}"
    for name, spread in row["spread"].items():
        if len(spread) != 5 or list(spread) != sorted(spread) or row.get(name) != spread[2]:
            yield f"{name}: {row.get(name)} is not the median of the spread {spread}"


def print_table(rows: Sequence[Mapping[str, Any]], missing: Mapping[str, str] | None = None) -> None:
    """Rows aligned, with every column that one of them has; what is not measured is left blank, and `missing` says why.

    The spread is in the file only.
    """
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("spread", "repeats")]
    texts = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for text in texts if rows else ():
        print("  ".join(cell.rjust(width) for cell, width in zip(text, widths, strict=True)))
    for what, why in (missing or {}).items():
        print(f"not measured: {what}: {why}")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
