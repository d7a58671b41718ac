"""Run a function in several processes that talk by gloo, for a bounded time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = 120


def _enter(rank: int, world: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    try:
        torch.save(function(rank, world, *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_processes(function: Callable, world: int, *arguments: Any) -> list[Any]:
    """What function(rank, world, *arguments), defined at a module's top level, returns in each of `world` processes.

    Raises what a process raised, and TimeoutError after 120 seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        deadline = time.monotonic() + SECONDS
        processes = torch.multiprocessing.start_processes(
            _enter, (world, folder, function, arguments), nprocs=world, join=False, start_method="spawn"
        )
        try:
            while not processes.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} ran for more than {SECONDS} s in {world} processes")
        finally:
            for process in processes.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


class Collectives(TorchDispatchMode):
    """Records the collectives that this process starts: the name and the bytes of each."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.calls.append((func.overloadpacket.__name__, sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))

    def bytes_of(self, name: str) -> int:
        """The bytes of all collectives of that name."""
        return sum(size for called, size in self.calls if called == name)
