"""Every CPU path beside a process that spins on one core: with torch's number of threads, and with one.

Rounds take turns: quiet, then beside the other process; within each, every path with all threads and with one. A sample
is as many calls as take a twentieth of a second, so that it sees more than one slice of the scheduler's time. On a
machine with other work to do even "quiet" is busy: run it on one that is idle.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loftq_kernels as lk
from bench import harness
from bench.harness import Timing
from bench.subject import Subject
from loftq_kernels.threads import own_threads

SUBJECT = Subject(takes="2 min", quick="20 s")
MOST_OF_QUIET, MOST_OF_ONE_THREAD = 2.5, 1.3
SAMPLE_SECONDS = 0.05
GROUP, RANK = 64, 16
# It ends when its standard input does: with the benchmark, however that ends.
SPIN = """
import select, sys
print("spinning", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for _ in range(100_000):
        pass
"""

Sample = Callable[[], float]  # a sample: seconds per call


def run(output: Path, *, quick: bool) -> None:
    paths = small_paths() if quick else all_paths()
    seconds = measure(paths, rounds=2 if quick else 9)
    rows = [compared(path, times) for path, times in seconds.items()]
    harness.print_table(rows)
    harness.write_json(harness.result_file(output, "busy", quick=quick), {"milliseconds": rows})


# ---- the other process


@contextmanager
def another_process(spins: bool) -> Iterator[subprocess.Popen | None]:
    """Within it, if ``spins``, a child of this process computes without end, on a core that the system chooses."""
    if not spins:
        yield None
        return
    with subprocess.Popen([sys.executable, "-c", SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            child.stdout.readline()
            yield child
        finally:
            child.kill()


# ---- paths


def all_paths() -> dict[str, Sample]:
    init = {"init, MiniLM's 37 layers": initializer(384, 6), "init, one 4096x4096": one_matrix(4096)}
    return init | layer_paths(4096, 4096)


def small_paths() -> dict[str, Sample]:
    init = {"init, 7 layers": initializer(128, 1), "init, one 256x256": one_matrix(256)}
    return init | layer_paths(512, 512)


def initializer(width: int, blocks: int) -> Sample:
    """`quantize_model` of Linear layers of MiniLM's shapes, rank 16, LoftQ."""
    torch.manual_seed(0)
    sides = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    dense = nn.ModuleList(nn.Linear(*pair) for pair in sides * blocks + [(width, width)])

    def sample() -> float:
        model = copy.deepcopy(dense)
        started = time.perf_counter()
        lk.quantize_model(model, lk.QuantConfig(rank=RANK), progress=False)
        return time.perf_counter() - started

    return sample


def one_matrix(side: int) -> Sample:
    """`loftq_init` of a square matrix, rank 64: a large one is shared by all threads of torch."""
    torch.manual_seed(0)
    weight = torch.randn(side, side)

    def sample() -> float:
        started = time.perf_counter()
        lk.loftq_init(weight, "nf4", 4 * RANK)
        return time.perf_counter() - started

    return sample


def layer_paths(rows: int, columns: int) -> dict[str, Sample]:
    """Calls of one layer [rows, columns], bfloat16, nf4 with an adapter."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    packed = lk.quantize(weight, "nf4", GROUP)
    lora_A, lora_B = (torch.randn(shape).to(torch.bfloat16) for shape in ((RANK, columns), (rows, RANK)))

    def product(m: int, *, backward: bool = False) -> Callable[[], Any]:
        x = torch.randn(m, columns).to(torch.bfloat16).requires_grad_(backward)
        parts = [part.clone().requires_grad_(backward) for part in (lora_A, lora_B)]
        grad = torch.ones(m, rows, dtype=torch.bfloat16)

        def forward() -> Tensor:
            return lk.qlora_linear(x, packed, *parts)

        return (lambda: torch.autograd.grad(forward(), [x, *parts], grad)) if backward else forward

    calls = {
        "decode, M=1": product(1),
        "linear, M=128": product(128),
        "linear and backward, M=128": product(128, backward=True),
        "quantize": lambda: lk.quantize(weight, "nf4", GROUP),
        "dequantize": lambda: packed.dequantize(torch.bfloat16),
    }
    return {f"{name}, {rows}x{columns}": repeated(call) for name, call in calls.items()}


def repeated(call: Callable[[], Any]) -> Sample:
    """So many calls that they take SAMPLE_SECONDS here and now, on one thread."""
    with own_threads(1):
        call()
        started = time.perf_counter()
        call()
        count = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - started)))

    def sample() -> float:
        started = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - started) / count

    return sample


# ---- measurements


Times = dict[tuple[bool, bool], list[float]]  # (busy, alone) -> seconds


def measure(paths: dict[str, Sample], rounds: int) -> dict[str, Times]:
    both = (False, True)
    seconds: dict[str, Times] = {path: {(busy, alone): [] for busy in both for alone in both} for path in paths}
    for sample in paths.values():
        sample()  # First calls load libraries and allocate.
    for _ in range(rounds):
        for busy in both:
            with another_process(busy):
                for path, sample in paths.items():
                    for alone in both:
                        with own_threads(1) if alone else nullcontext():
                            seconds[path][busy, alone].append(sample())
    return seconds


def compared(path: str, times: Times) -> dict[str, Any]:
    """A row: medians in milliseconds of the four conditions, their ratios, and the targets that are missed."""
    names = {condition: _name(*condition) for condition in times}
    row = harness.timed_row({"path": path}, {names[c]: Timing.of(values) for c, values in times.items()}, 1e3)
    medians = {condition: row[name] for condition, name in names.items()}
    ratios = {
        "busy/quiet": medians[True, False] / medians[False, False],
        "busy/one thread": medians[True, False] / medians[False, True],
        "one thread, busy/quiet": medians[True, True] / medians[False, True],
    }
    limits = {"busy/quiet": MOST_OF_QUIET, "busy/one thread": MOST_OF_ONE_THREAD}
    missed = [f"{name} > {most}" for name, most in limits.items() if ratios[name] > most]
    return row | ratios | {"missed": "; ".join(missed) or None}


def _name(busy: bool, alone: bool) -> str:
    return f"{'busy' if busy else 'quiet'}, {'one thread' if alone else 'all threads'}"
