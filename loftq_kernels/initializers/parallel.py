"""One matrix per thread: matrices are independent, and each is computed by one of torch's threads or by a few.

Steps of an initializer are short. Where all threads meet at the end of each of them, one that the operating system has
put aside for another process holds up the others a thousand times per matrix. Threads that take one matrix after the
other wait for nobody. What a small matrix becomes does not depend on how many threads there are.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from loftq_kernels import threads

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKSPACE_COPIES = 8  # The exact solver holds at most so many float32 copies of a square weight.
# Working set in bytes, that of 8.4 million weights, from which several threads serve one matrix where there are more
# threads than matrices. At rank 16 and T = 5 (two cores of an AMD EPYC) smaller ones take at most 0.3 s on one thread.
LARGE = 1 << 28


@dataclass(frozen=True)
class Division:
    """So many matrices at a time, and so many of torch's threads for each; None leaves that number as it is."""

    workers: int
    threads: int | None


def divide(count: int, shape: Sequence[int], device: torch.device, copies: int = WORKSPACE_COPIES) -> Division:
    """The division for ``count`` matrices of one shape, whose computation holds so many float32 copies of one.

    As many workers as there are threads (torch.get_num_threads(), at most the processors that this process may use),
    and as a quarter of the memory holds. On a GPU matrices wait for the same device: one at a time.
    """
    if device.type != "cpu":
        return Division(1, None)
    nbytes = max(1, copies * 4 * shape[0] * shape[1])
    most = min(torch.get_num_threads(), threads.available_cpus())
    workers = max(1, min(count, most, threads.available_memory() // 4 // nbytes))
    return Division(workers, 1 if nbytes < LARGE else max(1, most // workers))


def divide_reading(count: int, columns: int, device: torch.device) -> Division:
    """The division for checks that read ``count`` matrices of about columns x columns, and copy none."""
    return divide(count, (columns, columns), device, copies=1)


def each(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    division: Division,
    done: Callable[[int], None] | None = None,
) -> list[Result]:
    """[function(item) for item in items], several at a time; ``done(i)`` follows each in order, in the calling thread.

    The workers see the caller's modes. An exception is that of the first item in order that has one. After any in the
    calling thread, such as KeyboardInterrupt, workers stop at the next item or at the next `poll`, and are waited for.
    """
    if division.workers > 1 and not _bound_to_this_thread():
        with contextlib.suppress(_NoThreadError):
            return _Team(function, items, division).run(done)
    results = []
    for i, item in enumerate(items):
        with contextlib.nullcontext() if division.threads is None else threads.own_threads(division.threads):
            results.append(function(item))
        if done is not None:
            done(i)
    return results


class _NoThreadError(Exception):
    """Not one worker could be started: the interpreter is ending, or the system has no thread left."""


class _StoppedError(BaseException):
    """Ends what a worker computes after the caller was interrupted; nobody else sees it."""


_here = threading.local()


def poll() -> None:
    """Called between steps: ends the computation of a worker whose caller was interrupted."""
    team = getattr(_here, "team", None)
    if team is not None and team.stopped:
        raise _StoppedError


class _Team(Generic[Item, Result]):
    """Threads that take one item after the other, in order."""

    def __init__(self, function: Callable[[Item], Result], items: Sequence[Item], division: Division):
        self.function, self.items, self.division = function, items, division
        self.results: list[Result | None] = [None] * len(items)
        self.errors: dict[int, BaseException] = {}
        self.stopped = False  # Nobody wants the results any more.
        self._left = iter(range(len(items)))
        self._taking = threading.Lock()
        self._finished: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None: a worker has ended.
        self._modes = _modes_of_this_thread()

    def run(self, done: Callable[[int], None] | None) -> list[Result]:
        workers: list[threading.Thread] = []
        try:
            self._start(workers)
            self._wait(len(workers), done)
        except BaseException:
            self.stopped = True
            raise
        finally:
            for worker in workers:
                worker.join()
        if self.errors:
            raise self.errors[min(self.errors)]
        return self.results

    def _start(self, workers: list[threading.Thread]) -> None:
        """Start the workers, and have each set its number of threads; go on with fewer where no more can start."""
        ready = threading.Semaphore(0)
        try:
            with threads.default_kept():
                try:
                    for _ in range(self.division.workers):
                        workers.append(self._started(ready))
                finally:
                    for _ in workers:
                        ready.acquire()
        except RuntimeError as error:
            if not workers:
                raise _NoThreadError from error

    def _started(self, ready: threading.Semaphore) -> threading.Thread:
        context = contextvars.copy_context()
        worker = threading.Thread(target=context.run, args=(self._work, ready), name="loftq_kernels initializer")
        worker.start()
        return worker

    def _work(self, ready: threading.Semaphore) -> None:
        _here.team = self
        try:
            try:
                threads.set_own_threads(self.division.threads)
            finally:
                ready.release()
            with self._modes():
                while (i := self._take()) is not None:
                    self._compute(i)
        except BaseException as error:  # of the modes
            self.errors[len(self.items)] = error
        finally:
            self._finished.put(None)

    def _take(self) -> int | None:
        """The next item; none after an error or an interruption. All before one that failed were taken before it."""
        with self._taking:
            return None if self.stopped or self.errors else next(self._left, None)

    def _compute(self, i: int) -> None:
        try:
            self.results[i] = self.function(self.items[i])
        except BaseException as error:
            self.errors[i] = error
        else:
            self._finished.put(i)

    def _wait(self, running: int, done: Callable[[int], None] | None) -> None:
        """Until all workers have ended; tells the caller of items in their order."""
        finished, told = set(), 0
        while running:
            i = self._finished.get()
            if i is None:
                running -= 1
                continue
            finished.add(i)
            while told in finished:
                if done is not None:
                    done(told)
                told += 1


# ---- modes, which belong to the thread that entered them


def _bound_to_this_thread() -> bool:
    """Whether a mode is in force that other threads cannot enter: a user's own, or a transform of torch.func."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


def _modes_of_this_thread() -> Callable[[], AbstractContextManager[None]]:
    """A context in which another thread has this one's autograd, inference mode, autocast and default device."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    devices = [mode.device for mode in _get_current_function_mode_stack()]

    @contextlib.contextmanager
    def modes() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            if autocast:
                stack.enter_context(torch.autocast("cpu", dtype=dtype))
            for device in devices:
                stack.enter_context(device)
            yield

    return modes
