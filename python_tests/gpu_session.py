"""Runs of the tests that need a GPU, where device time is short: their order, and the report of a run that is cut.

Each kernel's smallest case runs before any grid; the grids then take turns, each in a mixed order, so that the cases
which the time leaves out are spread over all of them. A report on disk says before each case what was found so far.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

# Files in order of risk, first those that all others depend on. Other files come after these.
RISK = ("test_quantize", "test_ops", "test_triton_kernels", "test_triton_linear", "test_gpu", "test_small_matrix")
PATHS = {"decode", "prefill", "chunked", "fused"}  # Each is a kernel of its own; a case may name one.
CASE_SECONDS = 90  # A case that takes longer counts as hanging, and its process ends.


class Case(NamedTuple):
    nodeid: str
    params: Mapping[str, Any]

    @classmethod
    def of(cls, item: pytest.Item) -> Case:
        callspec = getattr(item, "callspec", None)
        return cls(item.nodeid, callspec.params if callspec else {})


def in_order_of_risk(cases: Iterable[Case]) -> list[Case]:
    kernels: dict[Any, list[Case]] = {}
    for case in cases:
        kernels.setdefault(_kernel(case), []).append(case)
    ordered = [_smallest_first(group) for group in sorted(kernels.values(), key=lambda group: _risk(group[0]))]
    rounds = itertools.zip_longest(*ordered)
    return [case for one_of_each in rounds for case in one_of_each if case is not None]


def _kernel(case: Case) -> tuple[str, frozenset]:
    return case.nodeid.partition("[")[0], frozenset(PATHS.intersection(_leaves(case, str)))


def _leaves(case: Case, kind: type) -> list:
    """The values of this type among a case's parameters, and inside those that are tuples or lists."""
    found, left = [], list(case.params.values())
    while left:
        value = left.pop()
        if isinstance(value, (tuple, list)):
            left += value
        elif type(value) is kind:
            found.append(value)
    return found


def _smallest_first(cases: list[Case]) -> list[Case]:
    smallest = min(cases, key=lambda case: math.prod(n for n in _leaves(case, int) if n > 0))
    rest = [case for case in cases if case is not smallest]
    random.Random(0).shuffle(rest)
    return [smallest, *rest]


def _risk(case: Case) -> int:
    stem = Path(case.nodeid.partition("::")[0]).stem
    return RISK.index(stem) if stem in RISK else len(RISK)


class GpuSession:
    """A pytest plugin: ends the run when its time is up or the device is lost, and keeps the report.

    A report that exists is continued: its cases are not run again, and the one it was cut in has failed.
    """

    def __init__(
        self,
        report: Path | None,
        seconds: float = math.inf,
        *,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[Path, Mapping[str, Any]], None] | None = None,
    ):
        self.path, self.clock, self.write = report, clock, write or _write_json
        self.end = clock() + seconds
        self.cases: dict[str, dict[str, Any]] = {}
        self.not_run: dict[str, str] = {}
        self.running: str | None = None
        self.lost: str | None = None
        if report is not None and report.exists():
            self._continue(json.loads(report.read_text(encoding="utf-8")))

    def _continue(self, earlier: Mapping[str, Any]) -> None:
        self.cases = dict(earlier["cases"])
        if earlier["running"]:
            self.cases[earlier["running"]] = {"outcome": "failed", "message": "the process ended in it, or it hung"}

    def save(self, finished: bool = False) -> None:
        if self.path is None:
            return
        counts = Counter(case["outcome"] for case in self.cases.values())
        summary = {**counts, "not run": len(self.not_run), "finished": finished, "device lost": self.lost}
        state = {"running": self.running, "cases": self.cases, "not run": self.not_run}
        self.write(self.path, {"summary": summary, **state})

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self.cases]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self.cases]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Return True, which tells pytest to skip the case, once nothing more is to run."""
        reason = self.lost or ("the time was up" if self.clock() >= self.end else None)
        if reason is not None:
            self.not_run[item.nodeid] = reason
            return True
        self.running = item.nodeid
        self.save()
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True, file=sys.__stderr__)
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        case = self.cases.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        case["seconds"] = round(case["seconds"] + report.duration, 3)
        if not report.passed:
            case["outcome"] = report.outcome
            if report.failed:
                case["message"] = _message(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.running = None
        if self.cases[nodeid]["outcome"] == "failed" and not device_answers():
            self.lost = f"the device was lost in {nodeid}"

    def pytest_sessionfinish(self) -> None:
        self.save(finished=self.lost is None)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for reason, count in Counter(self.not_run.values()).items():
            terminalreporter.write_line(f"{count} cases were not run: {reason}", yellow=True)


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else report.longreprtext).strip().partition("\n")[0][:300]


def device_answers() -> bool:
    """Whether this process can still use the device: after an illegal access no call of it succeeds."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _write_json(path: Path, results: Mapping[str, Any]) -> None:
    from bench.harness import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
