"""What this process may use of processors and memory, and numbers of threads that belong to one thread."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from pathlib import Path

import pytest
import torch
from helpers import in_new_thread, numbers

from loftq_kernels import threads
from loftq_kernels.initializers import parallel

CPU = torch.device("cpu")


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


QUOTAS = {
    "no files": ({}, None),
    "no limit": ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000"}, None),
    "its own": ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
    "one above is less": (
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
            "sys/fs/cgroup/a/cpu.max": "50000 100000",
            "sys/fs/cgroup/cpu.max": "max 100000",
        },
        0.5,
    ),
    "another group's": ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/b/cpu.max": "100000 100000"}, None),
    "its namespace's root": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 50000"}, 4.0),
    "a path of the host": ({"proc/self/cgroup": "0::/docker/12", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),
    "outside its namespace": ({"proc/self/cgroup": "0::/../x", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),
    "version 1": (
        {
            "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/a\n0::/",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        },
        2.5,
    ),
    "version 1, mounted by the controller's name": (
        {
            "proc/self/cgroup": "4:cpuacct,cpu:/a",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "20000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "10000",
        },
        2.0,
    ),
    "version 1 without a limit": (
        {
            "proc/self/cgroup": "1:cpu:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        None,
    ),
    "of another controller": (
        {
            "proc/self/cgroup": "2:cpuset:/a",
            "sys/fs/cgroup/cpuset/a/cpu.cfs_quota_us": "1",
            "sys/fs/cgroup/cpuset/a/cpu.cfs_period_us": "1",
        },
        None,
    ),
    "nonsense": ({"proc/self/cgroup": "what\n0::/\n:", "sys/fs/cgroup/cpu.max": "many few"}, None),
    "a period of zero": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "100000 0"}, None),
}


@pytest.mark.parametrize(("files", "quota"), QUOTAS.values(), ids=QUOTAS)
def test_cpu_quota(tmp_path, monkeypatch, files, quota):
    root = tree(tmp_path, files)
    assert threads.cpu_quota(root) == quota
    monkeypatch.setattr(threads, "_scheduled_cpus", lambda: 3)
    assert threads.available_cpus(root) == (3 if quota is None else min(3, math.ceil(quota)))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_unreadable_quota(tmp_path):
    root = tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "100000 100000"})
    (root / "sys/fs/cgroup/cpu.max").chmod(0)
    assert threads.cpu_quota(root) is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinities")
def test_affinity():
    """Of the thread that asks, as its children inherit it."""
    own = os.sched_getaffinity(0)

    def narrowed() -> int:
        os.sched_setaffinity(0, {min(own)})
        return threads.available_cpus()

    assert in_new_thread(narrowed) == 1
    assert 1 <= threads.available_cpus() <= len(own)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/memory.max": "max",
                "sys/fs/cgroup/a/memory.max": "5000",
            },
            5000,
        ),
        ({"proc/self/cgroup": "4:memory:/a", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "6000"}, 6000),
        ({"proc/self/cgroup": "4:cpu:/a", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "6000"}, None),
        ({}, None),
    ],
)
def test_memory_limit(tmp_path, files, limit):
    everything = threads._machine_memory()
    assert threads.available_memory(tree(tmp_path, files)) == (everything if limit is None else limit)


# ---- numbers of threads


@pytest.mark.parametrize("error", [None, ValueError])
def test_own_threads(machine, error):
    machine(3)
    with contextlib.suppress(ValueError), threads.own_threads(1):
        assert numbers() == (1, 3)
        with threads.own_threads(2):
            assert numbers() == (2, 3)
        assert numbers() == (1, 3)
        if error is not None:
            raise error
    assert numbers() == (3, 3)


def test_a_thread_with_a_number_of_its_own(machine):
    """What a thread has set for itself is neither the number of new threads nor that of others."""
    machine(2)

    def other() -> tuple:
        threads.set_own_threads(2)
        with threads.default_kept():
            threads.set_own_threads(5)
        with threads.own_threads(1):
            inside = numbers()
        return inside, numbers()

    assert in_new_thread(other) == ((1, 2), (5, 2))
    assert numbers() == (2, 2)


def test_where_no_thread_can_start(machine, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    machine(2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert parallel.each(lambda i: (i, torch.get_num_threads()), range(3), parallel.Division(2, 1)) == [
            (i, 1) for i in range(3)
        ]
    assert numbers() == (2, 2)
