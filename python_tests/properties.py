"""hypothesis; where it is not installed, stand-ins with which its tests are skipped and those beside them run."""

from __future__ import annotations

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as hnp
except ImportError:

    class _Absent:
        """Any strategy or setting, of any arguments."""

        def __getattr__(self, name: str) -> _Absent:
            return self

        def __call__(self, *_, **__) -> _Absent:
            return self

    st = hnp = _Absent()

    def given(*_, **__):
        return pytest.mark.skip(reason="hypothesis is not installed")

    class settings:
        """As a decorator it changes nothing; there are no profiles."""

        def __init__(self, *_, **__): ...

        def __call__(self, test):
            return test

        @staticmethod
        def register_profile(*_, **__) -> None: ...

        @staticmethod
        def load_profile(_name: str) -> None: ...


__all__ = ["given", "hnp", "settings", "st"]
