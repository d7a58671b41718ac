"""Zeros on a device, with which the programs of a launch count what is done: parts of a tile, chunks of x A^T."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from .configs import cdiv

T = TypeVar("T")


class _Arena:
    """Zeros of one device that launches count with, and leave at zero.

    Eager launches of one stream run one after the other and share their counters. A launch that is captured into a CUDA
    graph keeps its own for good, because its graph may run long after and beside others. Zeros made during a capture
    would be zeros only once that graph has run, so they are made ahead, by the eager launches before any capture.
    """

    AHEAD = 1 << 20

    def __init__(self, device: torch.device):
        self.device = device
        self.of_stream: dict[int, Tensor] = {}
        # Kept for the life of the process: graphs never report their end, and launches may still use outgrown buffers.
        self.kept: list[Tensor] = []
        # It is empty if the very first launch is captured. Its graph then zeroes what it takes: see `take_captured`.
        self.ahead = torch.empty(0, dtype=torch.int32, device=device) if _capturing(device) else self._new(self.AHEAD)

    def _new(self, count: int) -> Tensor:
        if self.device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=self.device)

        def make() -> Tensor:
            zeros = torch.zeros(count, dtype=torch.int32, device=self.device)
            torch.cuda.current_stream(self.device).synchronize()  # Other streams will use the zeros.
            return zeros

        return outside_pools(make)

    def take(self, stream: int, count: int) -> Tensor:
        known = self.of_stream.get(stream)
        if known is None or known.numel() < count:
            if known is not None:
                self.kept.append(known)
            known = self.of_stream[stream] = self._new(max(2 * count, 4096))
        if self.ahead.numel() < self.AHEAD // 2:
            self.ahead = self._new(self.AHEAD)
        return known

    def take_captured(self, count: int) -> Tensor:
        count = cdiv(count, 32) * 32
        if self.ahead.numel() < count:  # One graph has more launches than foreseen: each replay zeroes these counters.
            taken = torch.zeros(count, dtype=torch.int32, device=self.device)
        else:
            taken, self.ahead = self.ahead[:count], self.ahead[count:]
        self.kept.append(taken)
        return taken


def outside_pools(make: Callable[[], T]) -> T:
    """make(), run on another thread. Memory pools (`torch.cuda.use_mem_pool`, or that of a model compiled with
    mode="reduce-overhead") belong to one thread, and report memory that outlives them as a leak."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_arenas: dict[torch.device, _Arena] = {}
_lock = threading.Lock()


def counter_zeros(device: torch.device, count: int) -> Tensor:
    """At least `count` counters of the current stream, all zero between launches."""
    with _lock:
        arena = _arenas.get(device)
        if arena is None:
            arena = _arenas[device] = _Arena(device)
        if device.type != "cuda":
            return arena.take(0, count)
        if _capturing(device):
            return arena.take_captured(count)
        return arena.take(torch._C._cuda_getCurrentRawStream(device.index), count)
