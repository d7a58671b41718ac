"""Zeros on a device, for launches whose programs count each other: the parts of a tile, the chunks of x A^T."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from loftq_kernels.triton_kernels.configs import cdiv

T = TypeVar("T")


class _Arena:
    """Zeros of one device that launches count with, and leave at zero.

    Eager launches of a stream, which run one after the other, share theirs. A launch that is captured into a CUDA graph
    gets its own for good: its graph may run beside others, long after, and zeros made during a capture would be zeros
    only once that graph has run. So they are made ahead, by the eager launches that come before any capture.
    """

    AHEAD = 1 << 20

    def __init__(self, device: torch.device):
        self.device = device
        self.of_stream: dict[int, Tensor] = {}
        # As long as the process: those of captured launches, for nobody tells when graphs end, and those that a stream
        # has outgrown, in which its launches may still count.
        self.kept: list[Tensor] = []
        # Empty where the first launch of all is captured: its graph then zeroes what it takes, see `take_captured`.
        self.ahead = torch.empty(0, dtype=torch.int32, device=device) if _capturing(device) else self._new(self.AHEAD)

    def _new(self, count: int) -> Tensor:
        if self.device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=self.device)

        def make() -> Tensor:
            zeros = torch.zeros(count, dtype=torch.int32, device=self.device)
            torch.cuda.current_stream(self.device).synchronize()  # other streams will use it
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
        if self.ahead.numel() < count:  # more launches than foreseen in one graph: each replay zeroes these
            taken = torch.zeros(count, dtype=torch.int32, device=self.device)
        else:
            taken, self.ahead = self.ahead[:count], self.ahead[count:]
        self.kept.append(taken)
        return taken


def outside_pools(make: Callable[[], T]) -> T:
    """make(), on another thread. Memory pools (`torch.cuda.use_mem_pool`, or that of a model compiled with
    mode="reduce-overhead") are a thread's own, and take it for a leak when what is made in them lives on."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_arenas: dict[torch.device, _Arena] = {}
_lock = threading.Lock()


def counter_zeros(device: torch.device, count: int) -> Tensor:
    """At least `count` counters of the current stream."""
    with _lock:
        arena = _arenas.get(device)
        if arena is None:
            arena = _arenas[device] = _Arena(device)
        if device.type != "cuda":
            return arena.take(0, count)
        if _capturing(device):
            return arena.take_captured(count)
        return arena.take(torch._C._cuda_getCurrentRawStream(device.index), count)
