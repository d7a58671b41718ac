"""How many processors this process may use, and how many threads of torch's serve the current thread."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

_ROOT = Path("/")
_UNKNOWN_MEMORY = 1 << 33


# ---- what this process may use


def available_cpus(root: Path = _ROOT) -> int:
    """Processors that this process may use, at least 1: by its affinity, and by the quota of its control groups.

    A quota of 1.5 processors makes 2: one thread could not use it up. ``root`` is where /proc and /sys stand.
    """
    quota = cpu_quota(root)
    cpus = _scheduled_cpus()
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def _scheduled_cpus() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13; it also knows -X cpu_count.
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Processors' worth of time per second that the control groups of this process allow, the least of them.

    None where no group has a limit or none can be read. Sources: cgroup-v2.rst (cpu.max) and sched-bwc.rst
    (cpu.cfs_quota_us, cpu.cfs_period_us) of Linux' documentation.
    """
    shares = (_share(*_quota_and_period(folder)) for folder in _own_groups("cpu", root))
    return min((share for share in shares if share is not None), default=None)


def _quota_and_period(folder: Path) -> tuple[str, str]:
    """Of a group of version 2, or of version 1."""
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return (quota, period) if quota else (_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _share(quota: str, period: str) -> float | None:
    """quota / period; None for "max", -1, and what is no number."""
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None


def available_memory(root: Path = _ROOT) -> int:
    """Bytes of memory that this process may use at most: the machine's, or the least limit of its control groups."""
    limits = [_machine_memory()]
    for folder in _own_groups("memory", root):
        texts = (_text(folder / name) for name in ("memory.max", "memory.limit_in_bytes"))
        limits += [int(text) for text in texts if text.isdigit()]
    return min(limits)


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return _UNKNOWN_MEMORY


def _own_groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process' control groups, each with those above it: limits of all of them hold.

    In a container the path may be the host's, which is not there: the folders above it are tried all the same, and the
    topmost is the container's own.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mounts = (controllers, controller) if controllers else ("", "unified")
        parts = [part for part in path.split("/") if part]
        own = [] if ".." in parts else parts
        for mount in dict.fromkeys(mounts):
            for depth in range(len(own), -1, -1):
                yield root.joinpath("sys/fs/cgroup", mount, *own[:depth])


def _text(path: Path) -> str:
    """What the file holds; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


# ---- threads of the current thread
#
# torch.set_num_threads sets two things: the number of threads that serve the calling thread, and the number that
# threads started later begin with. The functions here change the first alone.

_changing = threading.Lock()


def _new_lock_after_fork() -> None:
    """A child has the lock as another thread of its parent held it, and not that thread."""
    global _changing
    _changing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock_after_fork)


@contextlib.contextmanager
def default_kept() -> Iterator[None]:
    """Within it threads may set their own number; at its end threads that start later begin with what they did before.

    One at a time and short, for a foreign thread that starts meanwhile would begin with the wrong number. Raises
    RuntimeError where no thread can start.
    """
    known, over = threading.Event(), threading.Event()

    def keep() -> None:
        default = torch.get_num_threads()  # This thread is new: that is what new ones begin with.
        torch.set_num_threads(default)  # The first number that is set in a process is the size of torch's second pool.
        known.set()
        over.wait()
        torch.set_num_threads(default)

    with _changing:
        keeper = threading.Thread(target=keep, name="loftq_kernels settings")
        keeper.start()
        try:
            known.wait()
            yield
        finally:
            over.set()
            keeper.join()


def set_own_threads(count: int) -> None:
    """Let ``count`` threads serve the current thread, which begins with the common number when it first asks for it."""
    torch.get_num_threads()
    torch.set_num_threads(count)


@contextlib.contextmanager
def own_threads(count: int) -> Iterator[None]:
    """Within it ``count`` of torch's threads serve the current thread; other threads, and later ones, keep theirs."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    _set_alone(count)
    try:
        yield
    finally:
        _set_alone(before)


def _set_alone(count: int) -> None:
    try:
        with default_kept():
            set_own_threads(count)
    except RuntimeError:  # No thread can start, so none will begin with a wrong number.
        set_own_threads(count)
