"""One kernel path tried: its cases, and the row that comes of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple


class Finding(NamedTuple):
    """ratio: the error over what it may be, so that a result passes up to 1; said: the figures behind it."""

    ratio: float
    said: str


@dataclass(frozen=True)
class Case:
    """One result that is compared with what is right; find computes both."""

    label: str
    find: Callable[[], Finding]


def worst_of(ratios: list[float]) -> float:
    """The largest, or NaN where there is one."""
    return max(ratios, key=lambda ratio: math.inf if math.isnan(ratio) else ratio)


def _here() -> None:
    return None


@dataclass(frozen=True)
class KernelPath:
    """One road through the kernels. missing() says why it is not on this machine; setting() holds while it is tried."""

    device: str
    name: str
    cases: Iterable[Case] = ()
    missing: Callable[[], str | None] = _here
    setting: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Row:
    """What came of one path. worst: the largest error over its budget; said: about the case that has it, or why not."""

    device: str
    path: str
    cases: int
    worst: float | None
    seconds: float
    outcome: str  # "pass", "FAIL" or "not here"
    said: str = ""


def attempt(path: KernelPath) -> Row:
    """Try every case of a path. Whatever it raises becomes a row, so that the other paths are tried as well."""
    started, done, label = time.perf_counter(), [], ""

    def row(outcome: str, said: str, worst: float | None = None) -> Row:
        return Row(path.device, path.name, len(done), worst, time.perf_counter() - started, outcome, said)

    try:
        reason = path.missing()
        if reason is not None:
            return row("not here", reason)
        with path.setting():
            for case in path.cases:
                label = case.label
                done.append((label, case.find()))
    except Exception as error:
        return row("FAIL", f"{label}: {_one_line(error)}" if label else _one_line(error))
    if not done:
        return row("FAIL", "there is no case")
    worst = worst_of([finding.ratio for _, finding in done])
    label, finding = next(pair for pair in done if pair[1].ratio is worst)
    return row("pass" if worst <= 1 else "FAIL", f"{label}: {finding.said}", worst)


def _one_line(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]
