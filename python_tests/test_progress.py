"""Progress: a bar where somebody watches, lines where standard error is redirected, nothing unless asked for there."""

from __future__ import annotations

import io
import sys

import pytest

from loftq_kernels import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("show", "lines"), [(None, 0), (False, 0), (True, 3)])
def test_redirected(monkeypatch, clock, show, lines):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.progress_bar(total=5, desc="plan", unit="batch", show=show) as bar:
        for _ in range(5):
            clock[0] += 6.0
            bar.set_postfix(loss="0.5")
            bar.update()
    said = sys.stderr.getvalue()
    assert "\r" not in said and "\x1b" not in said
    expected = [f"plan: {done} of 5 batches, {6 * done} s, loss 0.5" for done in (2, 4, 5)]
    assert said.splitlines() == (expected if lines else [])


def test_iterating(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress.progress_bar([3, 4], desc="x", unit="model", show=True)) == [3, 4]
    assert sys.stderr.getvalue() == "x: 2 of 2 models, 0 s\n"
    assert list(progress.progress_bar(iter("ab"), unit="step", show=True)) == ["a", "b"]
    assert sys.stderr.getvalue().splitlines()[1] == "2 steps, 0 s"


def test_a_failure_is_no_end(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(ValueError), progress.progress_bar(total=5, desc="x", show=True) as bar:
        bar.update()
        raise ValueError
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(("show", "shown"), [(None, True), (True, True), (False, False)])
def test_terminal(monkeypatch, show, shown):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.progress_bar(total=2, desc="plan", unit="layer", show=show) as bar:
        bar.update(2)
    assert ("2/2" in sys.stderr.getvalue()) is shown


def test_notebook(monkeypatch):
    """Its standard error is no terminal, and shows a bar as it should be."""
    pytest.importorskip("tqdm")
    kind = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    monkeypatch.setattr(sys, "stderr", kind())
    list(progress.progress_bar(range(2), show=None))
    assert "2/2" in sys.stderr.getvalue()


def test_without_a_stream_and_without_tqdm(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress.progress_bar(range(3), show=True)) == [0, 1, 2]
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "tqdm", None)
    assert list(progress.progress_bar(range(3), desc="x", show=None)) == [0, 1, 2]
    assert sys.stderr.getvalue() == "x: 3 of 3 its, 0 s\n"
