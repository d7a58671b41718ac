"""Progress on standard error: tqdm's bar where somebody watches, whole lines now and then where it is redirected."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

try:
    from tqdm import tqdm
except ImportError:  # A machine with torch and Triton alone runs the kernels.
    tqdm = None

_SECONDS = 10.0  # between two lines


def progress_bar(iterable: Iterable | None = None, *, show: bool | None, **options: Any):
    """tqdm's bar, or `Lines` with the same methods; both take tqdm's total, initial, desc and unit.

    show: None for a bar on a terminal and in a notebook and nothing elsewhere, True for lines elsewhere, False for
    nothing.
    """
    watched = is_watched()
    if not (watched if show is None else show):
        return Lines(iterable, quiet=True, **options)
    return Lines(iterable, **options) if tqdm is None or not watched else tqdm(iterable, **options)


def is_watched() -> bool:
    """Whether standard error can go back to the start of a line: on a terminal, and in a notebook, which is none."""
    stream = sys.stderr
    if stream is None:
        return False
    return type(stream).__module__.startswith("ipykernel") or bool(getattr(stream, "isatty", bool)())


class Lines:
    """What this package uses of tqdm, as lines of text: one whenever some seconds are over, and one at the end."""

    def __init__(
        self,
        iterable: Iterable | None = None,
        *,
        total: int | None = None,
        initial: int = 0,
        desc: str = "",
        unit: str = "it",
        quiet: bool = False,
    ):
        self._iterable = () if iterable is None else iterable
        self._total = len(self._iterable) if total is None and isinstance(iterable, Sized) else total
        self._done, self._description, self._unit, self._extra = initial, desc, unit, ""
        self._quiet = quiet or sys.stderr is None
        self._started = self._said = time.monotonic()

    def __iter__(self) -> Iterator:
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is None:
            self._say()

    def update(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._said >= _SECONDS and self._done != self._total:  # The last line is still to come.
            self._say()

    def set_postfix(self, **values) -> None:
        self._extra = "".join(f", {name} {value}" for name, value in values.items())

    def set_description(self, text: str) -> None:
        self._description = text

    def _say(self) -> None:
        self._said = time.monotonic()
        if not self._quiet:
            of = f" of {self._total}" if self._total is not None else ""
            seconds = self._said - self._started
            units = f"{self._unit}es" if self._unit.endswith("ch") else f"{self._unit}s"
            line = f"{self._description}: {self._done}{of} {units}, {seconds:.0f} s{self._extra}"
            print(line.removeprefix(": "), file=sys.stderr, flush=True)
