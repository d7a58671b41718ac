"""Progress bars: tqdm's, or none where it is not installed."""

from __future__ import annotations

try:
    from tqdm import tqdm
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
