"""Progress bars: tqdm's, or none where it is not installed."""

from __future__ import annotations

import sys

try:
    from tqdm import tqdm as _tqdm

    class tqdm(_tqdm):
        """tqdm's bar, which fails where a process has no standard error, as daemons have: there it shows nothing."""

        def __init__(self, *args, disable: bool = False, **options):
            super().__init__(*args, disable=disable or sys.stderr is None, **options)

except ImportError:

    class tqdm:
        """What this package uses of tqdm, showing nothing: a machine with torch and Triton alone runs the kernels."""

        def __init__(self, iterable=(), **_):
            self._iterable = iterable

        def __iter__(self):
            return iter(self._iterable)

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None: ...

        def update(self, count: int = 1) -> None: ...

        def set_postfix(self, **_) -> None: ...

        def set_description(self, text: str) -> None: ...


__all__ = ["tqdm"]
