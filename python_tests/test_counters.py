"""The counters of launches, as far as they can be tested without a device."""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("triton")

from loftq_kernels.triton_kernels import counters  # noqa: E402


def test_outside_pools():
    """The function runs on a thread of its own, and its failures reach the caller."""
    assert counters.outside_pools(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        counters.outside_pools(lambda: 1 // 0)


def test_a_streams_counters_are_its_own_and_grow():
    arena = counters._Arena(torch.device("cpu"))
    first, other = arena.take(1, 10), arena.take(2, 10)
    assert first.data_ptr() != other.data_ptr() and arena.take(1, 5) is first
    grown = arena.take(1, 10_000)
    assert grown.numel() >= 10_000 and not grown.any()
    assert any(kept is first for kept in arena.kept)  # Launches of the stream may still count in it.


def test_captured_launches_never_share():
    """Each captured launch keeps counters of its own, also beyond those that were made ahead."""
    arena = counters._Arena(torch.device("cpu"))
    taken = [arena.take_captured(count) for count in (7, 33, arena.AHEAD, 5)]
    assert [t.numel() for t in taken] == [32, 64, arena.AHEAD, 32]
    starts = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in taken)
    assert all(end <= start for (_, end), (start, _) in zip(starts, starts[1:], strict=False))
    assert not any(t.any() for t in taken)
